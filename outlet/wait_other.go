//go:build !linux

package outlet

// waitable reports that it cannot be known here when a child has exited without
// reaping it.
func waitable(int) bool { return false }
