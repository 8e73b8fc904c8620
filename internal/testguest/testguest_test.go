package testguest

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	pass := "p 00000001 00001000" + strings.Repeat(" 00000000", 16) + "\n"
	for name, c := range map[string]struct {
		output      string
		first, last int64
		repeated    int
		err         string
	}{
		"ticks":               {output: "r\nt 00000010\nt 00000011\n" + pass + "t 00000012\n", first: 16, last: 18},
		"first line cut":      {output: "0001 00001000\nt 00000010\n", first: 16, last: 16},
		"last line cut":       {output: "t 00000010\nt 0000", first: 16, last: 16},
		"its units repeated":  {output: "t 00000012\nt 000000133\nt 00000014\n", first: 18, last: 20, repeated: 1},
		"its tens repeated":   {output: "t 00000012\nt 000000113\nt 00000014\n", first: 18, last: 20, repeated: 1},
		"another repeated":    {output: "t 00000012\nt 000000144\n", err: "the guest said"},
		"zero repeated":       {output: "t 00000012\nt 000000013\n", first: 18, last: 19, repeated: 1},
		"pass repeated":       {output: "t 00000012\npp" + pass[1:] + "t 00000013\n", first: 18, last: 19, repeated: 1},
		"tick missing":        {output: "t 00000012\nt 00000014\n", err: "tick 20 came after tick 18"},
		"tick twice":          {output: "t 00000012\nt 00000012\n", err: "tick 18 came after tick 18"},
		"page damaged":        {output: "t 00000012\nb 00000005 deadbeef\n", err: "page 5 is damaged"},
		"garbage":             {output: "t 00000012\nt 0000x013\n", err: "the guest said"},
		"nothing":             {output: "t 0000", err: "said nothing"},
		"a character missing": {output: "t 00000012\nt 0000013\n", err: "the guest said"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Parse([]byte(c.output))
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("%+v, %v; want %q", got, err, c.err)
				}
				return
			}
			if err != nil || got.First != c.first || got.Last != c.last || got.Repeated != c.repeated {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
}
