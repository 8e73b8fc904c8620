package migrate_test

import (
	"fmt"
	"time"

	"drafter/migrate"
)

// A migration that may take a minute and 100 MB/s, and is cancelled if that is not enough.
func ExampleLimits() {
	limits, err := migrate.Limits{Bandwidth: 100e6, Timeout: time.Minute, AtTimeout: migrate.Cancel}.WithDefaults()
	fmt.Println(limits.Downtime, err)
	_, err = migrate.Limits{NoPostCopy: true, AtTimeout: migrate.PostCopy}.WithDefaults()
	fmt.Println(err)
	// Output:
	// 300ms <nil>
	// post-copy is disabled, so it cannot be what happens at the timeout; choose cancel
}
