package main

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/portal-tunnel/portal/tests/fault/proxy"
	"github.com/portal-tunnel/portal/tests/fault/ruler"
	"github.com/portal-tunnel/portal/tests/process"
	"github.com/portal-tunnel/portal/tests/serving"
	"github.com/portal-tunnel/portal/tests/tunnels"
)

// An ending is what a reader saw of a transfer that was cut.
type ending int

const (
	reset ending = iota
	clean        // an end of file on truncated data
	wrong        // other bytes
	hung         // nothing for as long as silence
	other        // another error
	whole        // all of it: the cut came too late
	endings
)

func (e ending) String() string {
	return [...]string{"reset", "clean end", "wrong bytes", "told nothing", "another error", "not cut"}[e]
}

// tally counts endings.
type tally [endings]int

func (t tally) String() string {
	sum := 0
	for _, n := range t {
		sum += n
	}
	if sum == 0 {
		return "–"
	}
	var parts []string
	for e, n := range t {
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%v %d of %d", ending(e), n, sum))
		}
	}
	return strings.Join(parts, ", ")
}

// trial is what truncation does to one tunnel after another.
type trial struct {
	cuts, stalls int
	size         int64
	portal       *process.Portal
	dir          string
}

// result is a row of the table.
type result struct {
	system                       tunnels.System
	version                      string
	down, up, downStall, upStall tally
	err                          error
}

func truncation(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("truncation", flag.ContinueOnError)
	var t trial
	flags.IntVar(&t.cuts, "cuts", 20, "how `many` transfers each way are ended by FIN or RST")
	flags.IntVar(&t.stalls, "stalls", 2, "how `many` each way are left without a word")
	flags.Int64Var(&t.size, "size", 8<<20, "`bytes` of a transfer")
	out := flags.String("o", "", "write the table to `FILE` too")
	far := flags.String("far", "", "another tunnel's far end: a `COMMAND` with {target} and {addr}, where it listens")
	near := flags.String("near", "", "its near end: a `COMMAND` with {far} and {listen}")
	if err := flags.Parse(args); err != nil {
		return asUsage(err)
	}
	if (*far == "") != (*near == "") {
		return misuse("truncation: -far and -near go together")
	}
	if t.size < 1<<20 {
		return misuse("truncation: -size %d: below a megabyte all of it may be on its way before the cut", t.size)
	}
	systems, err := chosen(flags.Args(), *far, *near)
	if err != nil {
		return err
	}
	if t.dir, err = os.MkdirTemp("", "portal-fault-"); err != nil {
		return err
	}
	defer os.RemoveAll(t.dir)
	if slices.ContainsFunc(systems, func(s tunnels.System) bool { return s.Way != "" }) {
		if t.portal, err = process.BuildPortal(ctx, t.dir); err != nil {
			return err
		}
	}
	// Each has its own processes, target and proxy. Most of the time is waiting for those that say nothing.
	results := make([]result, len(systems))
	var all sync.WaitGroup
	turns := make(chan struct{}, 3)
	for i, s := range systems {
		all.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			results[i] = t.run(ctx, s)
			fmt.Fprintf(os.Stderr, "fault: %s: done\n", s.Name)
		})
	}
	all.Wait()
	table := t.table(results)
	fmt.Print(table)
	if *out != "" {
		err = os.WriteFile(*out, []byte(table), 0o644)
	}
	return errors.Join(err, verdict(results))
}

// verdict says which tunnels did not do what is asked of portal, and of one given by command lines.
func verdict(results []result) (err error) {
	for _, r := range results {
		if r.system.Peer {
			continue
		}
		if r.err != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", r.system.Name, r.err))
		}
		for _, n := range []tally{r.down, r.up, r.downStall, r.upStall} {
			if n[clean] > 0 || n[wrong] > 0 || n[hung] > 0 {
				err = errors.Join(err, fmt.Errorf("%s: %v", r.system.Name, n))
			}
		}
	}
	return err
}

// chosen are the systems that are asked for, or all.
func chosen(names []string, far, near string) (systems []tunnels.System, err error) {
	var known []string
	for _, s := range tunnels.Systems {
		known = append(known, s.Key)
		if len(names) == 0 && far == "" && !s.Seldom || slices.Contains(names, s.Key) {
			systems = append(systems, s)
		}
	}
	for _, n := range names {
		if !slices.Contains(known, n) {
			return nil, misuse("truncation: there is no tunnel %q: %s", n, strings.Join(known, ", "))
		}
	}
	if far != "" {
		systems = append(systems, byCommand(far, near))
	}
	return systems, nil
}

// byCommand is a tunnel of two command lines.
func byCommand(far, near string) tunnels.System {
	start := func(ctx context.Context, d *tunnels.Deployment) (string, error) {
		addr, err := d.Far.Addr()
		if err != nil {
			return "", err
		}
		run := func(at *tunnels.Host, name, command, addr string, with ...string) error {
			return d.Listens(ctx, addr, at, name, "sh", "-c", "exec "+strings.NewReplacer(with...).Replace(command))
		}
		if err := run(d.Far, "far", far, addr, "{target}", d.Target, "{addr}", addr); err != nil {
			return "", err
		}
		through, err := d.Link(ctx, addr)
		if err != nil {
			return "", err
		}
		listen, err := d.Near.Addr()
		if err != nil {
			return "", err
		}
		return listen, run(d.Near, "near", near, listen, "{far}", through, "{listen}", listen)
	}
	return tunnels.System{Key: "command", Name: "by command", Is: far + "; " + near, Start: start}
}

func (t *trial) table(results []result) string {
	var b strings.Builder
	fmt.Fprintf(&b, "A transfer of %d bytes, cut between the tunnel's two ends. What its reader saw:\n\n", t.size)
	b.WriteString("| tunnel | download, cut by FIN or RST | upload, cut by FIN or RST | download, stalled for 45 s | upload, stalled for 45 s |\n|---|---|---|---|---|\n")
	for _, r := range results {
		name := r.system.Name
		if r.version != "" {
			name += " (" + strings.ReplaceAll(r.version, "|", " ") + ")"
		}
		if r.err != nil {
			fmt.Fprintf(&b, "| %s | %v | | | |\n", name, strings.ReplaceAll(r.err.Error(), "\n", " "))
			continue
		}
		fmt.Fprintf(&b, "| %s | %v | %v | %v | %v |\n", name, r.down, r.up, r.downStall, r.upStall)
	}
	return b.String()
}

// run cuts transfers through one tunnel.
func (t *trial) run(ctx context.Context, s tunnels.System) (r result) {
	r.system = s
	if r.err = s.Absent(); r.err != nil {
		return r
	}
	if s.Version != nil {
		r.version = tunnels.Version(ctx, s.Version[0], s.Version[1:]...)
	}
	target, err := newTarget(t.size)
	if err != nil {
		r.err = err
		return r
	}
	defer target.Close()
	b := &bench{trial: t, system: s, target: target}
	defer b.stop()
	number := uint32(0)
	one := func(counts *tally, kind proxy.Kind, down bool, offset int64) {
		if r.err != nil {
			return
		}
		if r.err = b.carries(ctx); r.err != nil {
			return
		}
		number++
		e, err := b.cut(ctx, number, kind, down, offset)
		if err != nil {
			r.err = err
			return
		}
		counts[e]++
	}
	for i := range t.cuts {
		kind, offset := []proxy.Kind{proxy.FIN, proxy.RST}[i%2], t.size*int64(1+2*(i/2%2))/4 // a quarter, three quarters
		one(&r.down, kind, true, offset)
		one(&r.up, kind, false, offset)
	}
	for i := range t.stalls {
		offset := t.size * int64(1+2*(i%2)) / 4
		one(&r.downStall, proxy.Stall, true, offset)
		one(&r.upStall, proxy.Stall, false, offset)
	}
	return r
}

// bench is a tunnel that is started anew when it does not come back.
type bench struct {
	*trial
	system tunnels.System
	target *target
	d      *tunnels.Deployment
	proxy  *proxy.Server
	tries  int
}

func (b *bench) stop() {
	if b.d == nil {
		return
	}
	b.d.Stop()
	b.d.Site.Close()
	if b.proxy != nil {
		b.proxy.Close()
	}
	b.d, b.proxy = nil, nil
}

// backWithin is how long a tunnel is waited for after a cut before it is started anew.
const backWithin = 15 * time.Second

// carries waits until an echo comes back, and starts the tunnel when there is none or it does not.
func (b *bench) carries(ctx context.Context) error {
	var failed error
	for range 3 {
		if b.d != nil {
			var err error
			for end := time.Now().Add(backWithin); time.Now().Before(end) && ctx.Err() == nil && b.d.Ended() == nil; time.Sleep(20 * time.Millisecond) {
				if err = echo(ctx, b.d.Addr); err == nil {
					return nil
				}
			}
			failed = errors.Join(b.d.Ended(), err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b.stop()
		site := tunnels.NewSite(b.target.Addr(), b.portal)
		site.Between = func(_ context.Context, addr string) (string, error) {
			p, err := proxy.Listen("", addr)
			if err != nil {
				return "", err
			}
			b.proxy = p
			return p.Addr(), nil
		}
		b.tries++
		var err error
		if b.d, err = site.Start(ctx, b.system, filepath.Join(b.dir, fmt.Sprintf("%s-%d", b.system.Key, b.tries))); err != nil {
			return err
		}
		if b.proxy == nil {
			return errors.New("it has no way that could be cut")
		}
	}
	return fmt.Errorf("nothing comes through it: %w", failed)
}

// cut is one transfer, and what its reader saw.
func (b *bench) cut(ctx context.Context, number uint32, kind proxy.Kind, down bool, offset int64) (ending, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", b.d.Addr)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	f := proxy.Fault{Kind: kind, At: offset, Direction: proxy.Out}
	if down != b.system.Backwards {
		f.Direction = proxy.In
	}
	d := b.proxy.Arm(f)
	head := append([]byte{'U'}, binary.BigEndian.AppendUint32(nil, number)...)
	if down {
		head[0] = 'D'
	}
	if _, err := c.Write(head); err != nil {
		return 0, err
	}
	c.SetDeadline(time.Now().Add(silence))
	if down {
		n, err := ruler.Receive(c, number)
		b.settle(d)
		return b.judge(n, err), nil
	}
	seen := b.target.expect(number)
	go func() { // the service says what it read; the client may be told by its own error or not at all
		if _, err := ruler.Send(c, number, b.size); err == nil {
			c.(*net.TCPConn).CloseWrite()
		}
	}()
	select {
	case s := <-seen:
		b.settle(d)
		return b.judge(s.n, s.err), nil
	case <-time.After(silence):
		b.settle(d)
		return hung, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// settle ends what a fault has left: a stalled connection, or the fault itself that did not come.
func (b *bench) settle(d *proxy.Damage) {
	select {
	case <-d.Done:
	default:
		b.proxy.Arm(proxy.Fault{Kind: proxy.RST, At: 1 << 60})
	}
	if d.Kind == proxy.Stall {
		b.proxy.Cut(proxy.AnyPreface)
	}
}

func (b *bench) judge(n int64, err error) ending {
	timeout := net.Error(nil)
	switch {
	case err == nil && n == b.size:
		return whole
	case err == nil:
		return clean
	case errors.Is(err, ruler.ErrWrong):
		return wrong
	case errors.Is(err, syscall.ECONNRESET):
		return reset
	case errors.As(err, &timeout) && timeout.Timeout():
		return hung
	}
	return other
}

func echo(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	if _, err := c.Write([]byte("Ehere")); err != nil {
		return err
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != "here" {
		return fmt.Errorf("%q came back", got)
	}
	return nil
}

// target is the service behind a tunnel: E echoes, D and a number sends a transfer, U and a number reads
// one and tells how it ended.
type target struct {
	*serving.Server
	size int64

	mu   sync.Mutex
	seen map[uint32]chan sight
}

type sight struct {
	n   int64
	err error
}

func newTarget(size int64) (t *target, err error) {
	t = &target{size: size, seen: make(map[uint32]chan sight)}
	t.Server, err = serving.Listen("tcp", "127.0.0.1:0", t.serve)
	return t, err
}

// expect gives where the outcome of an upload is told.
func (t *target) expect(number uint32) <-chan sight {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.seen[number] == nil {
		t.seen[number] = make(chan sight, 1)
	}
	return t.seen[number]
}

func (t *target) serve(c net.Conn) {
	kind := make([]byte, 1)
	if _, err := io.ReadFull(c, kind); err != nil {
		return
	}
	if kind[0] == 'E' {
		io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		return
	}
	head := make([]byte, 4)
	if _, err := io.ReadFull(c, head); err != nil {
		return
	}
	number := binary.BigEndian.Uint32(head)
	if kind[0] == 'D' {
		if _, err := ruler.Send(c, number, t.size); err == nil {
			c.(*net.TCPConn).CloseWrite()
			c.SetReadDeadline(time.Now().Add(silence))
			io.Copy(io.Discard, c)
		}
		return
	}
	t.expect(number)
	n, err := ruler.Receive(c, number)
	t.mu.Lock()
	seen := t.seen[number]
	t.mu.Unlock()
	select {
	case seen <- sight{n, err}:
	default: // somebody sent a number twice
	}
}
