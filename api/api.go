// Package api holds what 'drafter daemon' and its clients say to each other: the resources of its
// REST API, version 1. Package client calls it, and package daemon serves it.
package api

import "time"

// States of a VM.
const (
	Creating = "creating" // its package is made, or it starts for the first time
	Stopped  = "stopped"  // it is suspended: the next start resumes it
	Starting = "starting"
	Running  = "running"
	Stopping = "stopping"
	Exited   = "exited" // its service has ended, or its guest powered itself off: the next start boots it
	Failed   = "failed" // the next start boots it from its disks if it cannot be resumed
	Removing = "removing"
	Moving   = "moving"   // it runs, and is on its way to another host or process
	Arriving = "arriving" // it runs at another host, and is on its way to here
	Moved    = "moved"    // it runs at another host; its clients still reach it by this one
)

// States are all of them.
var States = []string{
	Creating, Stopped, Starting, Running, Stopping, Exited, Failed, Removing, Moving, Arriving, Moved,
}

// Restart policies of a VM.
const (
	No            = "no"
	Always        = "always"
	UnlessStopped = "unless-stopped"
)

// VM is a virtual machine of a host.
type VM struct {
	ID          string            `json:"id" doc:"Never changes, and is unique"`
	Name        string            `json:"name" doc:"Unique on its host"`
	Image       string            `json:"image" doc:"Reference of the OCI image"`
	Digest      string            `json:"digest,omitempty" doc:"Digest of the image"`
	Entrypoint  []string          `json:"entrypoint,omitempty" doc:"In place of the image's"`
	Command     []string          `json:"command,omitempty" doc:"In place of the image's"`
	Dir         string            `json:"dir,omitempty" doc:"Working directory, in place of the image's"`
	User        string            `json:"user,omitempty" doc:"In place of the image's"`
	Stdin       bool              `json:"stdin,omitempty" doc:"Its program waits until an exec with main runs it, with input"`
	TTY         bool              `json:"tty,omitempty" doc:"Its program waits until an exec with main runs it, with a terminal"`
	Egress      []string          `json:"egress,omitempty" doc:"What it may open connections to, if not all"`
	Package     string            `json:"package,omitempty" doc:"Key of the package that it runs from"`
	PackageID   string            `json:"packageID,omitempty" doc:"Tells its package from others with that key"`
	Foreign     bool              `json:"foreign,omitempty" doc:"Its package is not on this host"`
	State       string            `json:"state" enum:"creating,stopped,starting,running,stopping,exited,failed,removing,moving,arriving,moved"`
	Host        string            `json:"host,omitempty" doc:"Other host: where it moves or has moved, or from which it arrives"`
	From        string            `json:"from,omitempty" doc:"Host from which it has come"`
	Moves       int               `json:"moves,omitempty" doc:"How often it has moved, to another host or another process"`
	Error       string            `json:"error,omitempty" doc:"Why it failed"`
	ExitStatus  *int              `json:"exitStatus,omitempty" doc:"Of its service, if that has ended"`
	Booted      string            `json:"booted,omitempty" doc:"Why it booted from its disks at its last start, if it was not resumed"`
	Ports       []Port            `json:"ports,omitempty"`
	Memory      int64             `json:"memory" doc:"Bytes"`
	CPUs        int               `json:"cpus"`
	DiskRead    int64             `json:"diskReadBps,omitempty" doc:"Most bytes a second that it reads from its host's disk; 0: no limit"`
	DiskWrite   int64             `json:"diskWriteBps,omitempty" doc:"Most bytes a second that it writes there; 0: no limit"`
	Cgroup      string            `json:"cgroup,omitempty" doc:"Control group with its limits, while it has one"`
	Remove      bool              `json:"remove,omitempty" doc:"It is removed when it has ended"`
	Restart     string            `json:"restart,omitempty" enum:"no,always,unless-stopped" doc:"Whether it is started again when it has ended, and when the daemon starts"`
	UserStopped bool              `json:"userStopped,omitempty" doc:"A user has stopped or killed it, and not started it since"`
	Labels      map[string]string `json:"labels,omitempty"`
	Namespace   string            `json:"namespace,omitempty" doc:"Network namespace, while it has one"`
	Anchor      string            `json:"anchor,omitempty" doc:"Network namespace by which clients reach its ports, if it has left that"`
	Next        string            `json:"next,omitempty" doc:"Network namespace that it moves to within this host"`
	PID         int               `json:"pid,omitempty" doc:"Of the process that owns it, while it runs"`
	Created     time.Time         `json:"created"`
	Started     *time.Time        `json:"started,omitempty" doc:"When it was started last"`
	Ended       *time.Time        `json:"ended,omitempty" doc:"When it ended last"`
}

// Port is a published port.
type Port struct {
	Address  string `json:"address,omitempty" doc:"Of the host; none for all of them"`
	Host     int    `json:"host" minimum:"1" maximum:"65535"`
	Guest    int    `json:"guest" minimum:"1" maximum:"65535"`
	Protocol string `json:"protocol,omitempty" enum:"tcp,udp" default:"tcp"`
}

// Run asks for a VM of an image.
type Run struct {
	Image      string            `json:"image" minLength:"1" doc:"docker://NAME[:TAG|@DIGEST] or any reference that 'drafter blueprint oci' takes, or the name or key of a package"`
	Name       string            `json:"name,omitempty" pattern:"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$" doc:"Of the VM; made up if there is none"`
	Entrypoint []string          `json:"entrypoint,omitempty" doc:"In place of the image's, whose command is left out, too; one empty string: none"`
	Command    []string          `json:"command,omitempty" doc:"In place of the image's command, behind its entrypoint"`
	Dir        string            `json:"dir,omitempty" doc:"Working directory in place of the image's, absolute; it is made if there is none"`
	User       string            `json:"user,omitempty" doc:"NAME, UID, NAME:GROUP or UID:GID in place of the image's"`
	Stdin      bool              `json:"stdin,omitempty" doc:"The image's program does not start as a service: it waits until an exec with main runs it, with input. The VM ends with it"`
	TTY        bool              `json:"tty,omitempty" doc:"Likewise, with a terminal"`
	Egress     []string          `json:"egress,omitempty" doc:"What the VM may open connections to: allow, deny, or subnets and names, each for all ports or with one; none: allow"`
	Env        []string          `json:"env,omitempty" doc:"Added to the environment of its service, as NAME=value; kept for this VM only, not in a package"`
	Ports      []Port            `json:"ports,omitempty"`
	Memory     int64             `json:"memory,omitempty" doc:"Bytes; 0: 1 GiB"`
	CPUs       int               `json:"cpus,omitempty" minimum:"0" doc:"0: 1"`
	DiskRead   int64             `json:"diskReadBps,omitempty" minimum:"0" doc:"Most bytes a second that it reads from its host's disk; 0: no limit"`
	DiskWrite  int64             `json:"diskWriteBps,omitempty" minimum:"0" doc:"Most bytes a second that it writes there; 0: no limit"`
	Platform   string            `json:"platform,omitempty" doc:"Of the image, such as linux/arm64"`
	Pull       string            `json:"pull,omitempty" enum:"missing,always,never" default:"missing"`
	Remove     bool              `json:"remove,omitempty" doc:"Remove the VM when it has ended"`
	Restart    string            `json:"restart,omitempty" enum:"no,always,unless-stopped" default:"no" doc:"Whether the VM is started again when its service has ended or it has failed, and when the daemon starts; unless-stopped leaves it alone if a user has stopped it"`
	Labels     map[string]string `json:"labels,omitempty"`
}

// Rename asks for another name of a VM.
type Rename struct {
	Name string `json:"name" pattern:"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"`
}

// States of an operation.
const (
	Working   = "working"
	Done      = "done"
	Broken    = "failed"
	Cancelled = "cancelled"
)

// Operation is work that takes time.
type Operation struct {
	ID       string     `json:"id"`
	Kind     string     `json:"kind" doc:"Such as run, start, stop, remove, move or upgrade"`
	VM       string     `json:"vm,omitempty" doc:"ID of the VM"`
	Move     *Moves     `json:"move,omitempty" doc:"What a move has taken"`
	Package  string     `json:"package,omitempty" doc:"Key of the package that it has made or found"`
	State    string     `json:"state" enum:"working,done,failed,cancelled"`
	Error    string     `json:"error,omitempty"`
	Progress []Progress `json:"progress,omitempty" doc:"Steps, in the order in which they began"`
	Began    time.Time  `json:"began"`
	Ended    *time.Time `json:"ended,omitempty"`
}

// Progress is how far a step of an operation is.
type Progress struct {
	Step  string `json:"step"`
	Done  int64  `json:"done"`
	Total int64  `json:"total" doc:"In the step's own unit, mostly bytes; 0: not known"`
}

// Event says that something has changed.
type Event struct {
	ID   int64     `json:"id" doc:"Grows by one with each event"`
	Time time.Time `json:"time"`
	Type string    `json:"type" doc:"Such as vm.running"`
	VM   *VM       `json:"vm,omitempty"`
}

// Host is what a daemon says of itself.
type Host struct {
	Name       string  `json:"name"`
	Version    string  `json:"version"`
	VMs        int     `json:"vms"`
	Running    int     `json:"running"`
	MemoryFree int64   `json:"memoryFree" doc:"Bytes"`
	Drained    bool    `json:"drained,omitempty" doc:"No VM starts here: see 'drafter drain'"`
	Checks     []Check `json:"checks,omitempty" doc:"What the daemon has found of its host at its start"`
}

// LogLine is a piece of what a VM's service has printed: mostly a line.
type LogLine struct {
	Time   time.Time `json:"time"`
	Stream string    `json:"stream"` // stdout or stderr
	Text   string    `json:"text"`
}

// Exec is a program to run in a VM, over a WebSocket at /v1/vms/{vm}/exec. The request has it as
// JSON in the query parameter exec. Each binary message begins with one byte, its channel, as below.
type Exec struct {
	Main    bool     `json:"main,omitempty"` // the program that a VM waits for which was run with stdin or tty; no args
	Args    []string `json:"args"`           // program and arguments
	Env     []string `json:"env,omitempty"`
	Dir     string   `json:"dir,omitempty"`
	User    string   `json:"user,omitempty"` // name, uid, name:group or uid:gid
	TTY     bool     `json:"tty,omitempty"`
	Rows    uint16   `json:"rows,omitempty"`
	Columns uint16   `json:"columns,omitempty"`
	Stdin   bool     `json:"stdin,omitempty"`  // there will be input
	System  bool     `json:"system,omitempty"` // in the guest's system, not in the image's container
}

// InputWindow is how many bytes of input a client of an exec may have sent of which the daemon has not
// said that the program takes them (ChannelTaken).
const InputWindow = 256 << 10

// Channels of an exec's messages.
const (
	ChannelStdin  = 0 // to the program; an empty message ends its input
	ChannelStdout = 1
	ChannelStderr = 2
	ChannelStatus = 3 // ExecStatus as JSON, the last message
	ChannelSize   = 4 // WindowSize as JSON
	ChannelSignal = 5 // a number of a signal on Linux, in decimal
	ChannelTaken  = 6 // how many more bytes of input were taken, in decimal
)

// ExecStatus is how a program has ended.
type ExecStatus struct {
	ExitStatus int    `json:"exitStatus" doc:"As a shell has it: 128 and the signal's number, 126 or 127 for a program that was not started"`
	Error      string `json:"error,omitempty" doc:"Why it was not started, or was cut off"`
}

// WindowSize is the size of a terminal.
type WindowSize struct {
	Rows    uint16 `json:"rows"`
	Columns uint16 `json:"columns"`
}

// File describes a file of a VM.
type File struct {
	Directory bool      `json:"directory"`
	Mode      string    `json:"mode" doc:"As ls shows it"`
	Size      int64     `json:"size"`
	Modified  time.Time `json:"modified"`
}
