package api

import "time"

// Move asks for a VM to be moved to another host.
type Move struct {
	To string `json:"to" minLength:"1" doc:"Name of the host"`
}

// Moves is what a move has taken.
type Moves struct {
	Paused time.Duration `json:"paused" doc:"For how long the VM stood still, in nanoseconds"`
	Took   time.Duration `json:"took" doc:"From the other side's first call until nothing here was needed, in nanoseconds"`
	Sent   int64         `json:"sent" doc:"Bytes, with all overhead"`
	Saved  int64         `json:"saved" doc:"Bytes that were written and not sent: unchanged, zeros, or the package's"`
}

// Neighbour is another host, whose key this one knows, and which knows this one's.
type Neighbour struct {
	Name        string    `json:"name"`
	Address     string    `json:"address" doc:"HOST:PORT of its daemon"`
	Certificate string    `json:"certificate" doc:"PEM"`
	Added       time.Time `json:"added"`
}

// AddHost asks for another host to be added, on which 'drafter host token' has made a token.
type AddHost struct {
	Name    string `json:"name" pattern:"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"`
	Address string `json:"address" minLength:"1" doc:"HOST:PORT of its daemon (--listen)"`
	Token   string `json:"token" minLength:"1"`
}

// Token lets one other host be added, once, until it expires.
type Token struct {
	Token   string    `json:"token"`
	Expires time.Time `json:"expires"`
}

// Join is how a host introduces itself to one whose token it has. Its certificate is that of its TLS
// connection.
type Join struct {
	Name    string `json:"name" pattern:"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"`
	Address string `json:"address"`
	Secret  string `json:"secret"`
}

// Arrival asks a host to fetch a VM that runs at another one.
type Arrival struct {
	VM      VM       `json:"vm" doc:"As it is at its source"`
	Env     []string `json:"env" nullable:"true" doc:"Of its service, where that starts with one of its own; null for one that has started in its package"`
	Address string   `json:"address" doc:"Where its process gives it away"`
	Disk    int64    `json:"disk" doc:"Bytes that it has written"`
}

// Drain asks for all VMs that run to be moved to other hosts.
type Drain struct {
	Parallel int `json:"parallel,omitempty" minimum:"0" maximum:"16" doc:"How many move at a time; 0: 1"`
}
