package cli

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	switch os.Getenv("DRAFTER_AS") {
	case "command": // as the program itself, and then what ps(1) shows of it
		code := Main(os.Args)
		shown, err := os.ReadFile("/proc/self/cmdline")
		fmt.Printf("shown: %q %v\n", shown, err)
		os.Exit(code)
	case "program":
		os.Exit(Main(os.Args))
	case "arguments": // what the command gets
		fmt.Printf("got: %q\n", hideSecrets(os.Args))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// The secret key is on the command line that others see for no longer than the command needs to
// start; the command has it all the same.
func TestSecretsAreHidden(t *testing.T) {
	for _, args := range [][]string{
		{"peer", "--devices", `[{"name":"disk","base":"x","s3accesskey":"open","s3secretkey":"guess-me"}]`, "--bogus"},
		{"peer", `--devices=[{"name":"disk","S3SecretKey" : "gu\"ess-me"}, {"name":"memory","s3secretkey":"guess-me"}]`, "--bogus"},
		{"peer", "--devices", `[{"name":"disk","s3secretk\u0065y":"guess-me"}]`, "--bogus"},
		{"peer", "--device", "name=disk,s3secretkey=guess-me,s3accesskey=open", "--bogus"},
		{"peer", "--device=s3secretkey=guess-me,name=disk", "--bogus"},
	} {
		run := func(as string) string {
			t.Helper()
			cmd := exec.Command("/proc/self/exe", args...)
			cmd.Env = append(os.Environ(), "DRAFTER_AS="+as)
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Run(); as == "arguments" && err != nil {
				t.Fatal(err)
			}
			return out.String()
		}
		shown := run("command")
		if strings.Contains(shown, "ess-me") || !strings.Contains(shown, "--bogus") || !strings.Contains(shown, "*****") {
			t.Errorf("%q: shown is %s", args, shown)
		}
		if got := run("arguments"); strings.Count(got, "ess-me") != strings.Count(strings.Join(args, " "), "ess-me") {
			t.Errorf("%q: the command gets %s", args, got)
		}
	}
	plain := []string{"peer", "--devices", `[{"name":"disk","s3secretkey":""}]`, "--netns", "ark0"}
	for _, arg := range plain {
		for _, at := range secretsIn(arg) {
			if at[1] > at[0] {
				t.Errorf("%s: bytes %v are taken for a secret", arg, at)
			}
		}
	}
}

func TestSecretIsWarnedOf(t *testing.T) {
	var stderr bytes.Buffer
	code := Run(t.Context(), []string{"drafter", "peer", "--netns", "none", "--device", "name=disk,base=nowhere,s3secretkey=guess-me", "--raddr", "", "--laddr", ""}, &stderr, &stderr)
	if code == exitOK || !strings.Contains(stderr.String(), "--s3-credentials") || strings.Contains(stderr.String(), "guess-me") {
		t.Errorf("exit code %d: %s", code, &stderr)
	}
}
