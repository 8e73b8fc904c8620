package s3_test

import (
	"fmt"

	"drafter/s3"
)

// A place names a bucket and a prefix, of which each instance needs its own.
func ExamplePlace() {
	place := s3.Place{Endpoint: "s3.example.com", Secure: true, Bucket: "vms", Prefix: "redis-0"}
	fmt.Println(place, place.Check())
	place.Endpoint = "https://s3.example.com"
	fmt.Println(place.Check())
	// Output:
	// s3://vms/redis-0 <nil> s3endpoint "https://s3.example.com" must be HOST or HOST:PORT; say
	// with s3secure whether it speaks TLS
}
