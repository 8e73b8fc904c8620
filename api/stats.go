package api

import "time"

// Stats is what a VM uses of its host: its processes, and its network device.
type Stats struct {
	ID              string    `json:"id"`
	Name            string    `json:"name"`
	Time            time.Time `json:"time" doc:"Of these figures"`
	CPUNanoseconds  int64     `json:"cpuNanoseconds" doc:"CPU time since its last start; two answers give the load"`
	CPUs            int       `json:"cpus" doc:"Virtual ones"`
	Memory          int64     `json:"memory" doc:"Bytes of the host's memory, those of the guest's that it has touched among them"`
	GuestMemory     int64     `json:"guestMemory" doc:"Bytes of memory that the guest has"`
	DiskRead        uint64    `json:"diskRead" doc:"Bytes that were read from the host's disks since its last start"`
	DiskWritten     uint64    `json:"diskWritten" doc:"Bytes that were written to the host's disks since its last start"`
	NetworkReceived uint64    `json:"networkReceived" doc:"Bytes since its network namespace was made"`
	NetworkSent     uint64    `json:"networkSent" doc:"Bytes since its network namespace was made"`
	Processes       int       `json:"processes" doc:"Of the host"`
}
