package cli

import (
	"regexp"
	"strings"
	"unsafe"
)

// secretFields are the places of secrets on a command line: in the JSON of --devices, and in
// --device.
var secretFields = regexp.MustCompile(`(?i)"s3secretkey"\s*:\s*"((?:[^"\\]|\\.)*)"|s3secretkey=([^,]*)`)

// hideSecrets returns a copy of a process's own arguments, and overwrites the secrets in the
// original. The kernel reads /proc/PID/cmdline, which ps(1) shows to everybody, from there
// (proc_pid_cmdline(5)): the runtime's os.Args are the very bytes that execve(2) made.
func hideSecrets(args []string) []string {
	own := make([]string, len(args))
	for i, arg := range args {
		own[i] = strings.Clone(arg)
		for _, at := range secretsIn(own[i]) {
			b := unsafe.Slice(unsafe.StringData(arg), len(arg))[at[0]:at[1]]
			for j := range b {
				b[j] = '*'
			}
		}
	}
	return own
}

// secretsIn returns where the secrets in an argument begin and end.
func secretsIn(arg string) [][2]int {
	var list [][2]int
	for _, m := range secretFields.FindAllStringSubmatchIndex(arg, -1) {
		list = append(list, [2]int{max(m[2], m[4]), max(m[3], m[5])})
	}
	if start := strings.IndexByte(arg, '{'); len(list) == 0 && start >= 0 && strings.Contains(arg, `\u`) {
		list = append(list, [2]int{start, len(arg)}) // JSON can spell the field's name with escapes
	}
	return list
}
