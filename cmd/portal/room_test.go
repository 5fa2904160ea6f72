package main

import (
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/portal-tunnel/portal/inlet"
	"github.com/portal-tunnel/portal/internal/link"
	"github.com/portal-tunnel/portal/internal/stream"
	"github.com/portal-tunnel/portal/outlet"
	"github.com/portal-tunnel/portal/relay"
)

func TestWhereThereIsPlentyEveryLimitIsItsDefault(t *testing.T) {
	r := room{descriptors: 1 << 20, memory: math.MaxInt64, log: slog.New(slog.DiscardHandler)}
	l := r.link()
	if l.HalfOpen != link.DefaultHalfOpen || l.Channels != link.DefaultChannels || l.Stream.Budget.Limit != stream.DefaultBudget {
		t.Errorf("channels: %+v", l)
	}
	if l := r.relay(); l.Lanes != relay.DefaultLanes || l.Carried != relay.DefaultCarried || l.CarriedWindow != relay.DefaultCarriedWindow {
		t.Errorf("%d lanes, %d in carriers", l.Lanes, l.Carried)
	}
	if n := r.outlet(outlet.DefaultStreams, true).Streams; n != outlet.DefaultStreams {
		t.Errorf("%d streams of an outlet", n)
	}
	var in inlet.Server
	if r.inlet(&in, 20000); in.MaxStreams != 20000 {
		t.Errorf("%d streams of an inlet", in.MaxStreams)
	}
}

func TestAnIdentityHasItsShareOfAnOutletWhateverThereIsRoomFor(t *testing.T) {
	for _, c := range []struct {
		given               bool
		descriptors, wanted int
		each                int // of a thousand
	}{{false, 1 << 20, 0, 0}, {true, 1 << 20, 500, 500}, {true, 1024, 500, 500}} {
		r := room{descriptors: c.descriptors, memory: math.MaxInt64, log: slog.New(slog.DiscardHandler)}
		p := &outletPlan{outletOptions: outletOptions{name: "db", streams: 1000, streamsEach: c.wanted, eachGiven: c.given, command: []string{"true"}}}
		l := p.server(&member{}, r, r.log).Limits
		if c.descriptors == 1024 && l.Streams >= c.wanted {
			t.Fatalf("there is room for %d streams: nothing is proved", l.Streams)
		}
		if want := l.Streams * c.each / 1000; l.StreamsEach != want {
			t.Errorf("%+v: %d of %d streams", c, l.StreamsEach, l.Streams)
		}
	}
}

// Whatever others make a process hold is within what it has, and everything is there at least once.
func TestWhatIsSharedOutIsNotMoreThanThereIs(t *testing.T) {
	for _, descriptors := range []int{1, 100, 256, 1024, 20000} {
		for _, memory := range []int64{1 << 20, 32 << 20, 102 << 20, 4 << 30, math.MaxInt64} {
			r := room{descriptors: descriptors, memory: memory, log: slog.New(slog.DiscardHandler)}
			l, relays := r.link(), r.relay()
			lanes, carried := relays.Lanes, relays.Carried
			out, command := r.outlet(20000, false).Streams, r.outlet(20000, true).Streams
			var in inlet.Server
			r.inlet(&in, 20000)
			for _, n := range []int{l.HalfOpen, l.Channels, lanes, carried, out, command, in.MaxStreams} {
				if n < 1 {
					t.Errorf("%d descriptors, %d MiB: a limit of %d", descriptors, memory>>20, n)
				}
			}
			if descriptors < 256 || memory < 32<<20 {
				continue // nothing can be had for that; it is tried all the same
			}
			all := []*door{{server: new(inlet.Server)}, {server: new(inlet.Server)}, {server: new(inlet.Server)}}
			r.doors(all)
			doors := 0
			for _, d := range all {
				if doors += d.server.MaxStreams; d.server.MaxStreams < 1 || d.server.Budget != all[0].server.Budget || d.server.Budget.Limit != l.Stream.Budget.Limit {
					t.Errorf("%d descriptors, %d MiB: a name of connect has %d streams, and not the others' budget", descriptors, memory>>20, d.server.MaxStreams)
				}
			}
			for role, n := range map[string]int{
				"connect": doors - l.HalfOpen - l.Channels, "relay": lanes*laneDescriptors + min(2*lanes, relay.MaxPipes)*pipeDescriptors, "outlet": out, "command": command * commandDescriptors, "inlet": in.MaxStreams - l.HalfOpen - l.Channels,
			} {
				if all := n + l.HalfOpen + l.Channels + kept; all > descriptors {
					t.Errorf("%s takes %d of %d descriptors", role, all, descriptors)
				}
			}
			if memory == math.MaxInt64 {
				continue
			}
			channels := int64(l.HalfOpen*halfOpenCost + l.Channels*channelCost)
			held := 2 * l.Stream.Budget.Limit
			for role, n := range map[string]int64{"relay": int64(lanes*laneCost + carried*carriedCost*relays.CarriedWindow), "outlet": int64(out * streamCost), "inlet": int64(in.MaxStreams*streamCost) - channels, "connect": int64(doors*streamCost) - channels} {
				if all := channels + held + n; all > memory/16*13 {
					t.Errorf("%s may be made to hold %d of %d MiB", role, all>>20, memory>>20)
				}
			}
		}
	}
}

func TestTheLeastLimitOfTheControlGroupsIsFound(t *testing.T) {
	const none = math.MaxInt64
	for _, c := range []struct {
		name, groups string
		files        map[string]string
		want         int64
	}{
		{"version 2", "0::/a/b\n", map[string]string{"a/b/memory.max": "134217728\n"}, 128 << 20},
		{"version 2, a parent's", "0::/a/b\n", map[string]string{"a/b/memory.max": "max\n", "a/memory.max": "1048576\n"}, 1 << 20},
		{"version 2, the container's own", "0::/\n", map[string]string{"memory.max": "134217728\n"}, 128 << 20},
		{"version 2, a path of the host's", "0::/../../pods/x\n", map[string]string{"memory.max": "134217728\n"}, 128 << 20},
		{"version 2 without one", "0::/a\n", map[string]string{"a/memory.max": "max\n"}, none},
		{"version 1", "9:cpu:/c\n4:memory:/a\n0::/\n", map[string]string{"memory/a/memory.limit_in_bytes": "1048576\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"}, 1 << 20},
		{"version 1 without one", "4:memory:/a\n", map[string]string{"memory/a/memory.limit_in_bytes": "9223372036854771712\n"}, none},
		{"no groups", "", nil, none},
		{"what is no number", "0::/a\n", map[string]string{"a/memory.max": "lots\n"}, none},
	} {
		root := t.TempDir()
		for name, text := range c.files {
			path := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		file := filepath.Join(t.TempDir(), "cgroup")
		if err := os.WriteFile(file, []byte(c.groups), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := groupMemory(file, root); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
	if got := groupMemory("/nowhere", "/nowhere"); got != none {
		t.Errorf("elsewhere than on Linux: %d", got)
	}
}
