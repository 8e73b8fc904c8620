package s3_test

import (
	"fmt"

	"drafter/s3"
)

// A place names a bucket and a prefix, of which each instance needs its own.
func ExamplePlace() {
	place := s3.Place{Endpoint: "s3.example.com", Secure: true, Bucket: "vms", Prefix: "redis-0"}
	fmt.Println(place, place.Check())
	place.Prefix = "redis-0/"
	fmt.Println(place.Check())
	// Output:
	// s3://vms/redis-0 <nil>
	// s3prefix "redis-0/" must not begin or end with a slash
}
