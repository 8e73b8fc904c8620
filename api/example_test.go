package api_test

import (
	"encoding/json"
	"fmt"

	"drafter/api"
)

// What a client sends to run an image.
func Example() {
	b, err := json.Marshal(api.Run{Image: "docker://valkey/valkey", Name: "cache", Ports: []api.Port{{Host: 6379, Guest: 6379}}})
	fmt.Println(string(b), err)
	// Output: {"image":"docker://valkey/valkey","name":"cache","ports":[{"host":6379,"guest":6379}]} <nil>
}
