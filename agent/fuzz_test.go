package agent

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"testing"
)

// FuzzGreeting gives a guest any bytes in the place of its host's. Between greetings it gets them
// as they came; a greeting of another conversation ends this one.
func FuzzGreeting(f *testing.F) {
	greeting := append([]byte(portMagic), bytes.Repeat([]byte{7}, nonceSize)...)
	other := append([]byte(portMagic), bytes.Repeat([]byte{8}, nonceSize)...)
	for _, b := range [][]byte{
		nil, greeting, other, []byte("before"), append([]byte("before"), greeting...), append(bytes.Clone(greeting), "behind"...), append(bytes.Clone(greeting), other...), greeting[:20],
		append([]byte("before"), other[:len(portMagic)]...),
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// The host's half: what comes before its own greeting is dropped, and nothing behind it.
		r := bytes.NewReader(b)
		at := bytes.Index(b, greeting)
		if err := skipTo(r, greeting); (err == nil) != (at >= 0) {
			t.Fatalf("the greeting is at %d: %v", at, err)
		}
		if at >= 0 && r.Len() != len(b)-at-greetingLen {
			t.Fatalf("%d bytes are left behind the greeting", r.Len())
		}
		// The guest's half, in a conversation.
		c := &serialConn{serialPort: &serialPort{in: bufio.NewReader(bytes.NewReader(b))}, greeting: greeting}
		var got []byte
		p := make([]byte, 64)
		for {
			n, err := c.Read(p)
			got = append(got, p[:n]...)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil || n == 0 {
				t.Fatalf("%d bytes: %v", n, err)
			}
		}
		if len(got) > len(b) || !bytes.Equal(got, b[:len(got)]) && !bytes.Contains(b, greeting) {
			t.Fatalf("%q became %q", b, got)
		}
	})
}
