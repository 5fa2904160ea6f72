package outlet

import (
	"syscall"
	"unsafe"
)

// waitable returns when the child pid has exited, and leaves it to be reaped:
// until then its number, and its group's, is given to nobody else. It reports
// false when that cannot be known.
func waitable(pid int) bool {
	const (
		pPID    = 1
		wExited = 0x4
		wNoWait = 0x01000000
	)
	var info [128]byte // siginfo_t, waitid(2)
	for {
		_, _, err := syscall.Syscall6(syscall.SYS_WAITID, pPID, uintptr(pid), uintptr(unsafe.Pointer(&info)), wExited|wNoWait, 0, 0)
		if err != syscall.EINTR {
			return err == 0
		}
	}
}
