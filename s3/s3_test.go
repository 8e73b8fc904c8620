package s3

import (
	"strings"
	"testing"
)

// What cannot be a place is refused by the name of the setting; the others may be places.
func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(p *Place)
		want   string // "" if it may be a place
	}{
		{"as it is", func(*Place) {}, ""},
		{"with a port", func(p *Place) { p.Endpoint = "storage:9000" }, ""},
		{"without keys", func(p *Place) { p.AccessKey, p.SecretKey = "", "" }, ""},
		{"with a deep prefix", func(p *Place) { p.Prefix = "a/b/c" }, ""},
		{"with many uploads", func(p *Place) { p.Concurrency = 1000 }, ""},
		{"no bucket", func(p *Place) { p.Bucket = "" }, "s3bucket is missing"},
		{"a bucket that is none", func(p *Place) { p.Bucket = "No Bucket" }, `s3bucket "No Bucket" cannot be the name of a bucket`},
		{"a bucket that is a path", func(p *Place) { p.Bucket = "../vms" }, `s3bucket "../vms" cannot be the name of a bucket`},
		{"no endpoint", func(p *Place) { p.Endpoint = "" }, "s3endpoint is missing"},
		{"a URL", func(p *Place) { p.Endpoint = "https://storage" }, "say with s3secure whether it speaks TLS"},
		{"a key without its secret", func(p *Place) { p.SecretKey = "" }, "belong together"},
		{"a secret without its key", func(p *Place) { p.AccessKey = "" }, "belong together"},
		{"less than no uploads", func(p *Place) { p.Concurrency = -1 }, "s3concurrency -1"},
		{"too many uploads", func(p *Place) { p.Concurrency = 1001 }, "s3concurrency 1001"},
		{"a prefix from the root", func(p *Place) { p.Prefix = "/vm" }, "must not begin or end with a slash"},
		{"a prefix that is a directory", func(p *Place) { p.Prefix = "vm/" }, "must not begin or end with a slash"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := Place{Endpoint: "storage", Bucket: "vms", Prefix: "vm", AccessKey: "the-key", SecretKey: "the-secret"}
			tt.change(&p)
			err := p.Check()
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v; want one with %q", err, tt.want)
			}
			if err != nil && (strings.Contains(err.Error(), "the-key") || strings.Contains(err.Error(), "the-secret")) {
				t.Errorf("it tells a key: %v", err)
			}
		})
	}
}

// A place is named without its keys.
func TestString(t *testing.T) {
	p := Place{Endpoint: "storage", Bucket: "vms", AccessKey: "the-key", SecretKey: "the-secret"}
	if got := p.String(); got != "s3://vms" {
		t.Errorf("a bucket is %s", got)
	}
	p.Prefix = "one/vm"
	if got := p.String(); got != "s3://vms/one/vm" {
		t.Errorf("a place is %s", got)
	}
}
