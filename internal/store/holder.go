package store

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// holder returns the process that holds the flock of the file at path, 0 when the kernel does not say: proc(5), /proc/locks. A line is
//
//	1: FLOCK  ADVISORY  WRITE 3679 fe:00:9985801 0 EOF
//
// with process, device in hexadecimal and inode. Lines of those who wait have "->" in the second place.
func holder(path string) int {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	st := info.Sys().(*syscall.Stat_t)
	file := fmt.Sprintf("%02x:%02x:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)), st.Ino)
	locks, err := os.Open("/proc/locks")
	if err != nil {
		return 0
	}
	defer locks.Close()
	for lines := bufio.NewScanner(locks); lines.Scan(); {
		if f := strings.Fields(lines.Text()); len(f) >= 6 && f[1] == "FLOCK" && f[5] == file {
			pid, _ := strconv.Atoi(f[4])
			return max(pid, 0) // other namespaces' processes are 0 or negative
		}
	}
	return 0
}
