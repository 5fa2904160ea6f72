// Command llm shows a private model endpoint that is reached by an agent whose credential allows
// it, and refused to a guest: streamed answers through a relay, by OpenAI's Go client and by curl.
//
//	go run ./examples/llm
//
// It starts an OpenAI-compatible endpoint (a generator of words in place of a model), builds
// portal, and runs what a person would type on four hosts, each with its own home: a relay that
// issues the tickets, the endpoint's host with its outlet, an agent's inlet, a guest's inlet. Every
// line that it prints was checked before. It exits 0 when all of them held, 1 otherwise, and leaves
// nothing behind.
//
//	go run ./examples/llm serve --listen 127.0.0.1:8080
//
// is the endpoint alone, to be put behind an outlet by hand; it prints what to type.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"

	"github.com/portal-tunnel/portal/examples/walk"
	"github.com/portal-tunnel/portal/tests/process"
)

func main() {
	if len(os.Args) > 1 {
		if err := serve(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "llm:", err)
			os.Exit(1)
		}
		return
	}
	walk.Main("llm", run)
}

// serve is the endpoint alone, until SIGINT or SIGTERM.
func serve(args []string) error {
	flags := flag.NewFlagSet("llm serve", flag.ExitOnError)
	listen := flags.String("listen", "127.0.0.1:8080", "the endpoint's `address`")
	if args[0] != "serve" {
		return fmt.Errorf("there is no %q; serve, or nothing for the whole example", args[0])
	}
	flags.Parse(args[1:])
	ln, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	e := &endpoint{ended: func(a answered) {
		if a.err != nil {
			fmt.Fprintf(os.Stderr, "llm: %s: %d tokens, then %v\n", a.model, a.tokens, a.err)
			return
		}
		fmt.Fprintf(os.Stderr, "llm: %s: all %d tokens\n", a.model, a.tokens)
	}}
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	fmt.Fprintf(os.Stderr, `llm: http://%s/v1 answers as OpenAI's API; models: %s
Here:           portal outlet llm --to %s --allow 'principal.role == "agent"'
At the agent's: portal inlet llm --from 18080 --kind http
                curl -N http://localhost:18080/v1/chat/completions -d '{"model":"slow","stream":true,"messages":[{"role":"user","content":"hello"}]}'
For a client:   OPENAI_BASE_URL=http://localhost:18080/v1 OPENAI_API_KEY=none
`, ln.Addr(), strings.Join(e.names(), ", "), port)
	server := e.server()
	stopping := context.AfterFunc(ctx, func() { server.Close() })
	defer stopping()
	if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

const question = "Who may read the stream?"

func run(ctx context.Context, out io.Writer) error {
	return walk.Run(ctx, out, steps)
}

func steps(ctx context.Context, w *walk.Walk) error {
	x := &example{Walk: w, confirm: make(chan struct{}), ended: make(chan answered, 16)}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	e := &endpoint{confirmed: x.confirm, ended: func(a answered) { x.ended <- a }}
	server := e.server()
	served := make(chan struct{})
	go func() {
		defer close(served)
		server.Serve(ln)
	}()
	w.Later(func() error {
		defer func() { <-served }()
		return server.Close()
	})
	w.Say("endpoint on http://%s/v1: models %s", ln.Addr(), strings.Join(e.names(), ", "))

	relay, err := w.Relay(ctx)
	if err != nil {
		return err
	}
	w.Say("relay on %s, and the authority in it", relay)

	if err := w.Enroll(ctx, "relay", "gpu1", "--serve", "llm"); err != nil {
		return err
	}
	_, ready, err := w.Outlet(ctx, "gpu1", "llm", "--to", ln.Addr().String(), "--allow", `principal.role == "agent"`)
	if err != nil {
		return err
	}
	w.Say(`outlet llm ready %s; allow: principal.role == "agent"`, ready)

	if err := x.agent(ctx); err != nil {
		return fmt.Errorf("the agent: %w", err)
	}
	if err := x.guest(ctx); err != nil {
		return fmt.Errorf("the guest: %w", err)
	}
	return nil
}

type example struct {
	*walk.Walk
	confirm chan struct{} // to the endpoint, past portal: the last event of a lockstep answer is here
	ended   chan answered // from the endpoint, past portal
}

// client is OpenAI's, at an inlet. It sends the key that it must have; nobody asks for it.
func client(addr string) (openai.Client, *http.Transport) {
	t := &http.Transport{}
	return openai.NewClient(option.WithBaseURL("http://"+addr+"/v1"), option.WithAPIKey("none"),
		option.WithHTTPClient(&http.Client{Transport: t}), option.WithMaxRetries(0)), t
}

func ask(model string) openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{Model: model, Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(question)}}
}

// expected is what a model answers to the question.
func expected(model string) string {
	var b strings.Builder
	for token := range text(models[model], "user: "+question+"\n") {
		b.WriteString(token)
	}
	return b.String()
}

func (x *example) agent(ctx context.Context) error {
	if err := x.Enroll(ctx, "relay", "agent", "--attr", "role=agent"); err != nil {
		return err
	}
	at, how, err := x.Inlet(ctx, "agent", "ready", "llm", "--kind", "http")
	if err != nil {
		return err
	}
	x.Say("agent's inlet on %s, ready %s", at, how)

	c, t := client(at)
	defer t.CloseIdleConnections() // an inlet that is stopped waits for its streams
	for _, step := range []func(context.Context, *openai.Client) error{x.whole, x.lockstep, x.closed, x.long, x.itsOwnError} {
		if err := step(ctx, &c); err != nil {
			return fmt.Errorf("openai-go: %w", err)
		}
	}
	if !curlInstalled() {
		x.Say("agent: curl is not installed, what it shows is left out")
		return nil
	}
	for _, step := range []func(context.Context, string) error{x.curlLockstep, x.curlKilled} {
		if err := step(ctx, at); err != nil {
			return fmt.Errorf("curl: %w", err)
		}
	}
	return nil
}

// whole asks for the models, and for an answer in one piece.
func (x *example) whole(ctx context.Context, c *openai.Client) error {
	list, err := c.Models.List(ctx)
	if err != nil {
		return err
	}
	var names []string
	for _, m := range list.Data {
		names = append(names, m.ID)
	}
	if !slices.Contains(names, "brief") {
		return fmt.Errorf("the models are %q", names)
	}
	answer, err := c.Chat.Completions.New(ctx, ask("brief"))
	if err != nil {
		return err
	}
	if err := x.complete(ctx, "brief"); err != nil {
		return err
	}
	got := answer.Choices[0].Message.Content
	if want := expected("brief"); got != want || answer.Usage.CompletionTokens != int64(models["brief"].tokens) {
		return fmt.Errorf("the answer is %q of %d tokens, want %q", got, answer.Usage.CompletionTokens, want)
	}
	x.Say("agent: openai-go lists %d models; brief answers %q", len(names), strings.TrimSpace(got))
	return nil
}

// end waits until the endpoint says how an answer ended.
func (x *example) end(ctx context.Context) (answered, error) {
	ctx, cancel := walk.Patience(ctx, "the endpoint did not see the end of its answer")
	defer cancel()
	select {
	case a := <-x.ended:
		return a, nil
	case <-ctx.Done():
		return answered{}, context.Cause(ctx)
	}
}

// complete waits for an answer's end, which must be a good one.
func (x *example) complete(ctx context.Context, model string) error {
	a, err := x.end(ctx)
	if err == nil && (a.model != model || a.err != nil || a.tokens != models[model].tokens) {
		err = fmt.Errorf("%s answered %d tokens, %v", a.model, a.tokens, a.err)
	}
	return err
}

// gone waits for an answer's end, which must be that its caller is gone.
func (x *example) gone(ctx context.Context, tokens int) error {
	a, err := x.end(ctx)
	if err == nil && (!errors.Is(a.err, context.Canceled) || a.tokens != tokens) {
		err = fmt.Errorf("%s answered %d tokens and then %v, want %d and a caller that is gone", a.model, a.tokens, a.err, tokens)
	}
	return err
}

// inLockstep bounds an answer that waits for confirmations.
func inLockstep(ctx context.Context) (context.Context, context.CancelFunc) {
	return walk.Patience(ctx, "an event was sent and did not arrive")
}

// confirmed tells the endpoint that the event which it sent last is here. It sends no other before.
func (x *example) confirmed(ctx context.Context) error {
	select {
	case x.confirm <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// lockstep confirms each event of an answer behind portal's back: had anything on the way held one
// until there were more, no more would have come.
func (x *example) lockstep(ctx context.Context, c *openai.Client) error {
	events := 0
	ctx, cancel := inLockstep(ctx)
	defer cancel()
	s := c.Chat.Completions.NewStreaming(ctx, ask("lockstep"))
	defer s.Close()
	var got strings.Builder
	for s.Next() {
		events++
		for _, choice := range s.Current().Choices {
			got.WriteString(choice.Delta.Content)
		}
		if err := x.confirmed(ctx); err != nil {
			return err
		}
	}
	if s.Err() != nil {
		return fmt.Errorf("behind %d events: %w", events, errors.Join(s.Err(), context.Cause(ctx)))
	}
	if err := x.complete(ctx, "lockstep"); err != nil {
		return err
	}
	// A role, the tokens, a reason to finish; the end itself is none to this client.
	if want := expected("lockstep"); got.String() != want || events != models["lockstep"].tokens+2 {
		return fmt.Errorf("the answer is %q in %d events, want %q", &got, events, want)
	}
	x.Say("agent: openai-go streams %d events, each sent only when the one before had arrived", events)
	return nil
}

// early is how many tokens of an answer are read before its reader leaves.
const early = 4

// closed leaves in mid-answer. The endpoint sends nothing that could fail: it waits for the next
// confirmation, or for its caller's end.
func (x *example) closed(ctx context.Context, c *openai.Client) error {
	ctx, cancel := inLockstep(ctx)
	defer cancel()
	s := c.Chat.Completions.NewStreaming(ctx, ask("lockstep"))
	defer s.Close()
	for events := 0; events < early+1 && s.Next(); events++ {
		if events == early {
			break // not confirmed
		}
		if err := x.confirmed(ctx); err != nil {
			return err
		}
	}
	if s.Err() != nil {
		return errors.Join(s.Err(), context.Cause(ctx))
	}
	s.Close()
	if err := x.gone(ctx, early); err != nil {
		return err
	}
	x.Say("agent: openai-go closes a stream behind token %d of %d: the endpoint's request ends there", early, models["lockstep"].tokens)
	return nil
}

func (x *example) long(ctx context.Context, c *openai.Client) error {
	s := c.Chat.Completions.NewStreaming(ctx, ask("long"))
	defer s.Close()
	got, size := sha256.New(), 0
	for s.Next() {
		for _, choice := range s.Current().Choices {
			size += len(choice.Delta.Content)
			io.WriteString(got, choice.Delta.Content)
		}
	}
	if s.Err() != nil {
		return s.Err()
	}
	if err := x.complete(ctx, "long"); err != nil {
		return err
	}
	want := expected("long")
	if sum := sha256.Sum256([]byte(want)); !bytes.Equal(got.Sum(nil), sum[:]) {
		return fmt.Errorf("%d bytes arrived with the hash %x, want %d with %x", size, got.Sum(nil), len(want), sum)
	}
	x.Say("agent: openai-go reads %.1f MB in %d events, SHA-256 %.8x…, as they were generated", float64(size)/1e6, models["long"].tokens, got.Sum(nil))
	return nil
}

// itsOwnError shows that what the endpoint itself refuses comes through as it is.
func (x *example) itsOwnError(ctx context.Context, c *openai.Client) error {
	_, err := c.Chat.Completions.New(ctx, ask("none"))
	var refusal *openai.Error
	if !errors.As(err, &refusal) || refusal.StatusCode != http.StatusNotFound || refusal.Code != "model_not_found" || refusal.Param != "model" {
		return fmt.Errorf("asking for a model that there is not: %v", err)
	}
	x.Say("agent: the endpoint's own errors are untouched: %d %s: %s", refusal.StatusCode, refusal.Code, refusal.Message)
	return nil
}

func curlInstalled() bool {
	_, err := exec.LookPath("curl")
	return err == nil
}

// curl asks for a streamed answer. Neither a proxy nor a .curlrc of whoever runs this is heeded.
func curl(ctx context.Context, addr, model string, flags ...string) *exec.Cmd {
	body, _ := json.Marshal(map[string]any{
		"model": model, "stream": true, "messages": []any{map[string]string{"role": "user", "content": question}},
	})
	args := []string{"-q", "-sS", "-N", "--noproxy", "*", "http://" + addr + "/v1/chat/completions", "-d", string(body)}
	cmd := exec.CommandContext(ctx, "curl", append(args, flags...)...)
	cmd.Env = process.Environ()
	return cmd
}

// events starts curl and gives each event that it prints to handle, until that says no; curl is
// then killed. It returns what curl said on stderr.
func events(cmd *exec.Cmd, handle func(data string) (bool, error)) (stderr string, err error) {
	var e strings.Builder
	cmd.Stderr = &e
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		more, err := handle(data)
		if !more || err != nil {
			cmd.Process.Kill()
			cmd.Wait()
			return e.String(), err
		}
	}
	err = cmd.Wait()
	return e.String(), err
}

func (x *example) curlLockstep(ctx context.Context, addr string) error {
	ctx, cancel := inLockstep(ctx)
	defer cancel()
	count, last := 0, ""
	said, err := events(curl(ctx, addr, "lockstep"), func(data string) (bool, error) {
		count++
		if last = data; data == "[DONE]" {
			return true, nil
		}
		return true, x.confirmed(ctx)
	})
	if err != nil {
		return fmt.Errorf("behind %d events: %w: %s", count, errors.Join(err, context.Cause(ctx)), said)
	}
	if err := x.complete(ctx, "lockstep"); err != nil {
		return err
	}
	if want := models["lockstep"].tokens + 3; count != want || last != "[DONE]" {
		return fmt.Errorf("%d events, the last %q; want %d", count, last, want)
	}
	x.Say("agent: curl -N prints %d events in the same lockstep, the last is data: %s", count, last)
	return nil
}

func (x *example) curlKilled(ctx context.Context, addr string) error {
	ctx, cancel := inLockstep(ctx)
	defer cancel()
	count := 0
	said, err := events(curl(ctx, addr, "lockstep"), func(string) (bool, error) {
		if count++; count == early+1 {
			return false, nil
		}
		return true, x.confirmed(ctx)
	})
	if err != nil {
		return fmt.Errorf("%w: %s", errors.Join(err, context.Cause(ctx)), said)
	}
	if err := x.gone(ctx, early); err != nil {
		return err
	}
	x.Say("agent: curl is killed behind token %d: the endpoint's request ends there", early)
	return nil
}

func (x *example) guest(ctx context.Context) error {
	if err := x.Enroll(ctx, "relay", "guest", "--attr", "role=guest"); err != nil {
		return err
	}
	// --kind http: the inlet answers a refused client in HTTP.
	at, why, err := x.Inlet(ctx, "guest", "refused:", "llm", "--kind", "http")
	if err != nil {
		return err
	}
	x.Say("guest's inlet on %s, refused: %s", at, why)

	const code = "PORTAL-E0301"
	c, t := client(at)
	defer t.CloseIdleConnections()
	s := c.Chat.Completions.NewStreaming(ctx, ask("brief"))
	defer s.Close()
	if s.Next() {
		return errors.New("openai-go was let in")
	}
	// What Error says leaves out what the server sent; that is in the fields.
	var refusal *openai.Error
	if !errors.As(s.Err(), &refusal) || refusal.StatusCode != http.StatusForbidden || refusal.Code != code {
		return fmt.Errorf("openai-go: %v, want 403 and %s", s.Err(), code)
	}
	x.Say("guest: openai-go's error is %q, its Code %s, its Message %q", refusal, refusal.Code, refusal.Message)

	if curlInstalled() {
		if err := x.curlRefused(ctx, at, code); err != nil {
			return fmt.Errorf("curl: %w", err)
		}
	}
	select {
	case a := <-x.ended:
		return fmt.Errorf("the endpoint answered %s", a.model)
	default:
		return nil
	}
}

func (x *example) curlRefused(ctx context.Context, addr, code string) error {
	printed, err := curl(ctx, addr, "brief", "--fail-with-body").Output()
	var exit *exec.ExitError
	const httpError = 22
	if !errors.As(err, &exit) || exit.ExitCode() != httpError {
		return fmt.Errorf("%v, want exit status %d; it printed %s", err, httpError, printed)
	}
	var told struct {
		Error struct{ Code, Message string }
	}
	if err := json.Unmarshal(printed, &told); err != nil || told.Error.Code != code || told.Error.Message == "" {
		return fmt.Errorf("it printed %q: %v", printed, err)
	}
	x.Say("guest: curl exits %d and prints %s", httpError, printed)
	return nil
}
