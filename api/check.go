package api

// Levels of a check's result.
const (
	OK      = "ok"
	Warning = "warning" // VMs run, but something is slower, or missing
	Bad     = "error"   // VMs do not run
)

// Check is what 'drafter doctor' has found of one thing of a host.
type Check struct {
	Name   string `json:"name" doc:"What was looked at, such as kernel"`
	Level  string `json:"level" enum:"ok,warning,error"`
	Text   string `json:"text" doc:"What was found"`
	Remedy string `json:"remedy,omitempty" doc:"How to mend it"`
}
