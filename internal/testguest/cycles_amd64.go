package testguest

// cycles reads the time stamp counter.
func cycles() int64
