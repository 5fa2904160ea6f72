package control

import (
	"fmt"
	"net"
	"os"
	"syscall"
)

// samePeer refuses a process of another user, root aside: the file modes say
// so already, and are checked by nobody after a chmod.
func samePeer(c net.Conn) error {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var cred *syscall.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		cred, failed = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if failed != nil {
		return fmt.Errorf("asking who the peer is: %w", failed)
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("the other process belongs to user %d", cred.Uid)
	}
	return nil
}
