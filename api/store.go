package api

import "time"

// Sources of a package.
const (
	FromImage    = "image"    // the first run of an image has made it
	FromSnapshot = "snapshot" // of a VM
	FromImport   = "import"   // of an archive
	FromRegistry = "registry" // it was pushed there as a package
)

// Package is a suspended VM, from which any number of VMs start.
type Package struct {
	Key       string    `json:"key" doc:"Never changes, and is unique on its host"`
	Name      string    `json:"name,omitempty" doc:"Unique among the packages of its host"`
	Source    string    `json:"source,omitempty" enum:"image,snapshot,import,registry" doc:"None for one of an older daemon"`
	Reference string    `json:"reference,omitempty" doc:"Of the image, or of the package in a registry"`
	Digest    string    `json:"digest,omitempty" doc:"Of that"`
	Platform  string    `json:"platform,omitempty" doc:"Of the image"`
	Command   []string  `json:"command,omitempty" doc:"In place of the image's"`
	VM        string    `json:"vm,omitempty" doc:"Name of the VM that it is a snapshot of"`
	Memory    int64     `json:"memory" doc:"Bytes"`
	CPUs      int       `json:"cpus"`
	Held      bool      `json:"held,omitempty" doc:"Its guest starts the service when it is told the environment"`
	Hardware  Hardware  `json:"hardware"`
	Size      int64     `json:"size" doc:"Bytes that it takes on the disk"`
	Created   time.Time `json:"created"`
	Used      time.Time `json:"used" doc:"When a VM was made of it last"`
	VMs       []string  `json:"vms,omitempty" doc:"Names of the VMs that run from it, and without which it cannot be removed"`
}

// Hardware is the virtual hardware that a package depends on.
type Hardware struct {
	VMM     string `json:"vmm"`
	Version string `json:"version" doc:"Of the VMM"`
	Machine string `json:"machine"`
	CPU     string `json:"cpu" doc:"Model"`
	Accel   string `json:"accel"`
}

// Image is what a reference was when it was looked up.
type Image struct {
	Reference string    `json:"reference"`
	Platform  string    `json:"platform,omitempty" doc:"That was asked for; none for the host's"`
	Digest    string    `json:"digest"`
	Size      int64     `json:"size" doc:"Bytes, as its registry has it"`
	Artifact  bool      `json:"artifact,omitempty" doc:"It is a package that was pushed, and no image"`
	Found     time.Time `json:"found" doc:"When it was looked up"`
	Used      time.Time `json:"used" doc:"When a VM was made of it last"`
	Packages  []string  `json:"packages,omitempty" doc:"Keys of the packages that were made of it"`
}

// Pull asks for an image to be looked up, and for its package.
type Pull struct {
	Image    string   `json:"image" minLength:"1"`
	Command  []string `json:"command,omitempty" doc:"In place of the image's"`
	Memory   int64    `json:"memory,omitempty" doc:"Bytes; 0: 1 GiB"`
	CPUs     int      `json:"cpus,omitempty" minimum:"0" doc:"0: 1"`
	Platform string   `json:"platform,omitempty" doc:"Of the image, such as linux/arm64"`
}

// Push asks for a VM or a package to be stored in a registry.
type Push struct {
	Source    string `json:"source" minLength:"1" doc:"Name or ID of a VM, or name or key of a package"`
	Reference string `json:"reference" minLength:"1" doc:"docker://NAME[:TAG]"`
}

// Snapshot asks for a package of a VM.
type Snapshot struct {
	Name string `json:"name" pattern:"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$" doc:"Of the package"`
}

// Prune asks for what nobody needs to be removed.
type Prune struct {
	Unused int64 `json:"unused,omitempty" minimum:"0" doc:"Only what was not used for so many seconds"`
	All    bool  `json:"all,omitempty" doc:"Also packages with names: snapshots, and what was imported"`
	DryRun bool  `json:"dryRun,omitempty" doc:"Only tell what would be removed"`
}

// Pruned is what was removed, or would be.
type Pruned struct {
	Packages   []Package `json:"packages"`
	Images     []Image   `json:"images"`
	Blueprints []string  `json:"blueprints" doc:"Their keys"`
	Freed      int64     `json:"freed" doc:"Bytes"`
}
