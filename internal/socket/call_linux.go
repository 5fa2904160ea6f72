//go:build !race

package socket

import (
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

func read(fd int, b []byte) (int, error)  { return one(unix.SYS_READ, fd, b) }
func write(fd int, b []byte) (int, error) { return one(unix.SYS_WRITE, fd, b) }

func readv(fd int, bufs [][]byte) (int, error)  { return many(unix.SYS_READV, fd, bufs) }
func writev(fd int, bufs [][]byte) (int, error) { return many(unix.SYS_WRITEV, fd, bufs) }

func one(call uintptr, fd int, b []byte) (int, error) {
	// The conversions stand in the call's arguments: the memory is kept that long.
	return result(syscall.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b))))
}

func many(call uintptr, fd int, bufs [][]byte) (int, error) {
	var v [most]unix.Iovec
	for i, b := range bufs {
		v[i].Base = unsafe.SliceData(b)
		v[i].SetLen(len(b))
	}
	return result(syscall.RawSyscall(call, uintptr(fd), uintptr(unsafe.Pointer(&v)), uintptr(len(bufs))))
}

func splice(from, to, n int) (int, error) {
	return result(syscall.RawSyscall6(unix.SYS_SPLICE, uintptr(from), 0, uintptr(to), 0, uintptr(n), unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE))
}

func result(n, _ uintptr, errno syscall.Errno) (int, error) {
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
