package main

import (
	"bytes"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/relay"
)

// A room is what this process may take of its host: descriptors, and memory where a
// limit is set. It is shared out when a command begins, so that what others can make
// the process hold is refused before the kernel refuses something to the process, or
// ends it. Where there is plenty, every limit is its default.
type room struct {
	descriptors int
	memory      int64 // bytes; the largest number where nobody says
	log         *slog.Logger
}

const (
	// kept are descriptors for what nobody else asks for: the store, sockets that
	// commands ask on, dials of relays and of the authority, files read again.
	kept = 64

	// What one of each may hold, in bytes, besides what the budget of the streams
	// counts. Measured; docs/figures.md has it.
	halfOpenCost = 16 << 10 // a lane that has not proved itself
	channelCost  = 32 << 10 // a confirmed channel without streams
	laneCost     = 64 << 10 // a joined lane of a relay: a buffer of 16 KiB each way while little goes by, two goroutines
	// A lane in a carrier whose caller takes nothing fills its window, in a buffer that doubles. Where there
	// would be less than few of them the window is the least: slower over long lines, and four lanes for one.
	carriedCost = 2 // windows
	few         = 256
	streamCost  = 64 << 10 // two buffers that wait for a lane which takes nothing, one in hand; idle 13 KiB

	// A joined lane of a relay has two sockets and, while much goes by, a pipe each way: of
	// these there are at most relay.MaxPipes.
	laneDescriptors = 2
	pipeDescriptors = 2
	// A command as the target has two pipes, and one to who holds it.
	commandDescriptors = 3
)

// findRoom asks the kernel, and tells Go's collector of the memory.
func findRoom(log *slog.Logger) room {
	r := room{descriptors: math.MaxInt32, memory: math.MaxInt64, log: log}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err == nil && files.Cur < math.MaxInt32 {
		r.descriptors = int(files.Cur)
	}
	// GOMEMLIMIT is what whoever runs this has said; else four fifths of the control
	// group's: what is not Go's, as sockets' buffers are, has the rest.
	if given := debug.SetMemoryLimit(-1); given < math.MaxInt64 {
		r.memory = given
	} else if limit := groupMemory("/proc/self/cgroup", "/sys/fs/cgroup"); limit < math.MaxInt64 {
		r.memory = limit / 5 * 4
		debug.SetMemoryLimit(r.memory)
	}
	return r
}

// groupMemory is the least memory limit of the control groups that this process is in
// (cgroups(7), version 2 and 1), or a large number.
func groupMemory(file, root string) int64 {
	least := int64(math.MaxInt64)
	text, err := os.ReadFile(file)
	if err != nil {
		return least
	}
	for line := range strings.Lines(string(text)) {
		part := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(part) != 3 {
			continue
		}
		dir, name := root, "memory.max"
		switch {
		case part[0] == "0" && part[1] == "":
		case part[1] == "memory":
			dir, name = filepath.Join(root, "memory"), "memory.limit_in_bytes"
		default:
			continue
		}
		// From the group upwards: the parents' limits hold, too. In a container the
		// path may be the host's, of which there is only the root to be seen.
		for at := filepath.Clean("/" + part[2]); ; at = filepath.Dir(at) {
			if b, err := os.ReadFile(filepath.Join(dir, at, name)); err == nil {
				if n, err := strconv.ParseInt(string(bytes.TrimSpace(b)), 10, 64); err == nil && n > 0 && n < least {
					least = n
				}
			}
			if at == "/" {
				break
			}
		}
	}
	// Version 1 writes "none" as the largest number of pages.
	if least > math.MaxInt64-1<<20 {
		return math.MaxInt64
	}
	return least
}

// The numbers of link, relay, outlet and inlet share it out: of the descriptors an
// eighth and a quarter to channels, of the memory a sixteenth and an eighth; a quarter
// to streams and lanes, and a quarter, twice the budget, to what streams hold; at a relay
// an eighth to what lanes hold in carriers. What is left is the program's own.

// budget is what streams may hold for readers that are slower: it is reached twice
// before streams are reset.
func (r room) budget() *stream.Budget {
	return &stream.Budget{Limit: min(stream.DefaultBudget, r.memory/8)}
}

// link are the limits of channels and of those on their way.
func (r room) link() link.Limits {
	return link.Limits{
		HalfOpen: r.fit(link.DefaultHalfOpen, r.descriptors/8, r.memory/16/halfOpenCost),
		Channels: r.fit(link.DefaultChannels, r.descriptors/4, r.memory/8/channelCost),
		Stream:   stream.Limits{Budget: r.budget()},
	}
}

// left are the descriptors that nothing else has a share in.
func (r room) left(taken ...int) int {
	n := r.descriptors - kept
	for _, t := range taken {
		n -= t
	}
	return n
}

func (r room) relay() relay.Limits {
	l := r.link()
	left := r.left(l.HalfOpen, l.Channels)
	left = max(left/(laneDescriptors+2*pipeDescriptors), (left-relay.MaxPipes*pipeDescriptors)/laneDescriptors)
	lanes := r.fit(relay.DefaultLanes, left, r.memory/4/laneCost)
	window := relay.DefaultCarriedWindow
	carried := r.fit(relay.DefaultCarried, lanes, r.memory/8/carriedCost/relay.DefaultCarriedWindow)
	if carried < min(lanes, few) {
		window = relay.LeastCarriedWindow
		carried = r.fit(few, lanes, r.memory/8/carriedCost/relay.LeastCarriedWindow)
	}
	if lanes < relay.DefaultLanes || carried < relay.DefaultCarried {
		r.log.Info("the descriptors or the memory bound how many lanes there may be at once; a higher ulimit -n or more memory raises it",
			"lanes", lanes, "in carriers", carried, "their window", window, "descriptors", r.descriptors, "memory", r.memoryText())
	}
	return relay.Limits{Lanes: lanes, Carried: carried, CarriedWindow: window, Link: l}
}

// outlet are the limits of an outlet for which --max-streams says n.
func (r room) outlet(n int, command bool) outlet.Limits {
	l := r.link()
	each := 1
	if command {
		each = commandDescriptors
	}
	return outlet.Limits{Streams: r.streams("outlet", n, r.left(l.HalfOpen, l.Channels)/each), Link: l}
}

// inlet puts an inlet for which --max-streams says n into the room.
func (r room) inlet(s *inlet.Server, n int) {
	s.MaxStreams, s.Budget = r.streams("inlet", n, r.left()), r.budget()
}

// doors puts the inlets of connect into the room, which they share.
func (r room) doors(all []*door) {
	n, budget := r.fit(inlet.DefaultStreams, r.left()/len(all), r.memory/4/streamCost/int64(len(all))), r.budget()
	for _, d := range all {
		d.server.MaxStreams, d.server.Budget = n, budget
	}
}

// streams is n, or what there is room for, which is said.
func (r room) streams(role string, n, descriptors int) int {
	fit := r.fit(n, descriptors, r.memory/4/streamCost)
	if fit < n {
		r.log.Warn("there is no room for so many streams", "role", role, "--max-streams", n, "taken", fit,
			"descriptors", r.descriptors, "memory", r.memoryText())
	}
	return fit
}

func (r room) memoryText() string {
	if r.memory == math.MaxInt64 {
		return "no limit"
	}
	return strconv.FormatInt(r.memory>>20, 10) + " MiB"
}

// fit is n, or what there are descriptors and memory for: one at least.
func (r room) fit(n, descriptors int, memory int64) int {
	return max(min(n, descriptors, int(min(memory, math.MaxInt32))), 1)
}
