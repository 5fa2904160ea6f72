package outlet

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// A holder is a process that outlives this one by a moment. When this one is
// killed the kernel closes the input of its commands, which reads as an end,
// before it tells anybody of the death: of commands with no more than
// PR_SET_PDEATHSIG 38 of 600 read an end first. So each command has a
// holder, which has the writing end of the command's input open too and leads
// the command's process group. When this process is gone, however it went, the
// holder kills the group, itself included: every process of it has its SIGKILL
// before the holder's descriptors are closed, and reads no end.
//
// It is this program again, and its whole command line is holderName, in which
// no `pkill -f` finds the outlet: one that was killed at the same time would
// hold nothing. It takes 1 MiB of memory that it does not share.
const holderName = "command-input-holder"

// init makes this process a holder when it was started as one, whatever its
// program is.
func init() {
	if len(os.Args) == 1 && os.Args[0] == holderName {
		hold()
	}
}

// hold is a holder's life. Standard input is from the outlet: the number of the
// command, then a byte when the command's input ends in good order; standard
// output is what it holds.
func hold() {
	signal.Ignore() // whoever stops a service may signal each of its processes, and streams are drained then
	var number [4]byte
	if _, err := io.ReadFull(os.Stdin, number[:]); err == nil {
		for {
			if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
				break
			}
			os.Stdout.Close()
		}
		// A command that does not lead its group can leave it. The number is not
		// another's: who waits for a command kills its holder next.
		syscall.Kill(int(binary.BigEndian.Uint32(number[:])), syscall.SIGKILL)
	}
	if syscall.Getpgrp() == os.Getpid() {
		syscall.Kill(0, syscall.SIGKILL)
	}
	os.Exit(1)
}

// startHolder starts a holder of in, and returns what it listens to.
func startHolder(in *os.File) (holder *exec.Cmd, life *os.File, err error) {
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, nil, err
	}
	defer theirs.Close()
	held, err := duplicate(in)
	if err != nil {
		ours.Close()
		return nil, nil, err
	}
	defer held.Close()
	self := "/proc/self/exe" // also when the file was replaced by another version
	if runtime.GOOS != "linux" {
		if self, err = os.Executable(); err != nil {
			ours.Close()
			return nil, nil, err
		}
	}
	holder = &exec.Cmd{
		Path: self, Args: []string{holderName}, Env: []string{}, Dir: "/", Stdin: theirs, Stdout: held,
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true},
	}
	if err := holder.Start(); err != nil {
		ours.Close()
		return nil, nil, fmt.Errorf("holding its input: %w", err)
	}
	return holder, ours, nil
}

// duplicate gives f's descriptor once more. To pass f itself to a process would
// make its writes block a thread, and Close wait for them.
func duplicate(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	if e := raw.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); e != nil {
		err = e
	}
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// socketpair gives two connected sockets, of which only the first is for Go's
// poller.
func socketpair() (ours, theirs *os.File, err error) {
	syscall.ForkLock.RLock()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.CloseOnExec(fds[0])
		unix.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err == nil {
		err = unix.SetNonblock(fds[0], true)
	}
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	return os.NewFile(uintptr(fds[0]), "holder"), os.NewFile(uintptr(fds[1]), "holder"), nil
}
