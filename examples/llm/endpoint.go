package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"iter"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"
)

// endpoint speaks OpenAI's API in front of a generator of words: no weights, the same answer to the
// same prompt, and on the wire what a real one sends. It asks for no key.
type endpoint struct {
	// confirmed lets the answers of model "lockstep" go on: one receive before each event but the
	// first. nil: there is no such model.
	confirmed <-chan struct{}
	// ended is told of each answer when its last byte was written, or its caller was gone; it may
	// be called at the same time. nil: nobody is.
	ended func(answered)
}

// answered is how an answer ended.
type answered struct {
	model  string
	tokens int   // that were sent
	err    error // nil: all of them, and the end
}

// A model says how long and how fast an answer is.
type model struct {
	tokens   int
	words    int           // in a token
	pause    time.Duration // behind each token
	lockstep bool
}

var models = map[string]model{
	"brief":    {tokens: 12, words: 1},
	"slow":     {tokens: 24, words: 1, pause: 200 * time.Millisecond},
	"long":     {tokens: 12000, words: 128}, // some 9 MB
	"lockstep": {tokens: 12, words: 1, lockstep: true},
}

const (
	// maxRequest is a long conversation without its images.
	maxRequest = 1 << 20
	// headTime is how long a caller may take to say what it wants.
	headTime = 10 * time.Second
)

func (e *endpoint) server() *http.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/chat/completions", e.complete)
	mux.HandleFunc("GET /v1/models", e.list)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		refuse(w, http.StatusNotFound, "", "unknown_url", "there is no %s %s", r.Method, r.URL.Path)
	})
	return &http.Server{Handler: mux, ReadHeaderTimeout: headTime}
}

// refuse answers in the form of OpenAI's errors.
func refuse(w http.ResponseWriter, status int, param, code, format string, args ...any) {
	type problem struct {
		Message string  `json:"message"`
		Type    string  `json:"type"`
		Param   *string `json:"param"`
		Code    string  `json:"code"`
	}
	p := problem{Message: fmt.Sprintf(format, args...), Type: "invalid_request_error", Code: code}
	if param != "" {
		p.Param = &param
	}
	answer(w, status, map[string]problem{"error": p})
}

func answer(w http.ResponseWriter, status int, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, err = w.Write(append(b, '\n'))
	return err
}

// names of the models that there are.
func (e *endpoint) names() []string {
	var names []string
	for name, m := range models {
		if !m.lockstep || e.confirmed != nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (e *endpoint) list(w http.ResponseWriter, _ *http.Request) {
	type entry struct {
		ID      string `json:"id"`
		Object  string `json:"object"`
		Created int64  `json:"created"`
		OwnedBy string `json:"owned_by"`
	}
	list := struct {
		Object string  `json:"object"`
		Data   []entry `json:"data"`
	}{Object: "list"}
	for _, name := range e.names() {
		list.Data = append(list.Data, entry{ID: name, Object: "model", OwnedBy: "portal"})
	}
	answer(w, http.StatusOK, list)
}

// request is the part of a request that is heeded; the rest is let be, as others do.
type request struct {
	Model    string `json:"model"`
	Messages []struct {
		Role    string  `json:"role"`
		Content content `json:"content"`
	} `json:"messages"`
	Stream        bool `json:"stream"`
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
	MaxTokens           *int `json:"max_tokens"` // the older name
	MaxCompletionTokens *int `json:"max_completion_tokens"`
}

// content is text, or a list of parts of which some are.
type content string

func (c *content) UnmarshalJSON(b []byte) error {
	var parts []struct {
		Text string `json:"text"`
	}
	if json.Unmarshal(b, (*string)(c)) == nil {
		return nil
	}
	if err := json.Unmarshal(b, &parts); err != nil {
		return errors.New("content is neither text nor a list of parts")
	}
	for _, p := range parts {
		*c += content(p.Text)
	}
	return nil
}

// prompt is what the answer depends on.
func (r *request) prompt() string {
	var b strings.Builder
	for _, m := range r.Messages {
		fmt.Fprintf(&b, "%s: %s\n", m.Role, m.Content)
	}
	return b.String()
}

// limit is how many tokens the answer has, and why no more.
func (r *request) limit(m model) (tokens int, reason string) {
	for _, n := range []*int{r.MaxCompletionTokens, r.MaxTokens} {
		if n != nil && *n < m.tokens {
			return max(*n, 0), "length"
		}
	}
	return m.tokens, "stop"
}

// text is the answer of m to a prompt, token by token.
func text(m model, prompt string) iter.Seq[string] {
	return func(yield func(string) bool) {
		h := fnv.New64a()
		io.WriteString(h, prompt)
		random := rand.New(rand.NewPCG(h.Sum64(), 0))
		for range m.tokens {
			var b strings.Builder
			for range m.words {
				b.WriteString(vocabulary[random.IntN(len(vocabulary))])
				b.WriteByte(' ')
			}
			if !yield(b.String()) {
				return
			}
		}
	}
}

var vocabulary = strings.Fields(`a the one each every no some stream packet relay door key name reader writer
	opens closes carries seals waits begins ends holds never always slowly again before behind and but or`)

// chunk is an answer, or an event of one.
type chunk struct {
	ID      string   `json:"id"`
	Object  string   `json:"object"`
	Created int64    `json:"created"`
	Model   string   `json:"model"`
	Choices []choice `json:"choices"`
	Usage   *usage   `json:"usage,omitempty"`
}

type choice struct {
	Index   int      `json:"index"`
	Message *message `json:"message,omitempty"` // of an answer in one piece
	Delta   *message `json:"delta,omitempty"`   // of an event
	Finish  *string  `json:"finish_reason"`
}

type message struct {
	Role    string `json:"role,omitempty"`
	Content string `json:"content"`
}

type usage struct {
	Prompt     int `json:"prompt_tokens"`
	Completion int `json:"completion_tokens"`
	Total      int `json:"total_tokens"`
}

func (e *endpoint) complete(w http.ResponseWriter, r *http.Request) {
	var ask request
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxRequest)).Decode(&ask); err != nil {
		status := http.StatusBadRequest
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			status = http.StatusRequestEntityTooLarge
		}
		refuse(w, status, "", "invalid_json", "reading the request: %v", err)
		return
	}
	if !slices.Contains(e.names(), ask.Model) {
		refuse(w, http.StatusNotFound, "model", "model_not_found", "there is no model %q; there are %s", ask.Model, strings.Join(e.names(), ", "))
		return
	}
	if len(ask.Messages) == 0 {
		refuse(w, http.StatusBadRequest, "messages", "missing_required_parameter", "messages: there is none to answer")
		return
	}
	a := &completion{endpoint: e, model: models[ask.Model], ask: &ask, ctx: r.Context(), w: w}
	a.head = chunk{ID: fmt.Sprintf("chatcmpl-%016x", rand.Uint64()), Created: time.Now().Unix(), Model: ask.Model}
	var err error
	if ask.Stream {
		err = a.stream()
	} else {
		err = a.whole()
	}
	if e.ended != nil {
		e.ended(answered{ask.Model, a.sent, err})
	}
}

// completion is one answer.
type completion struct {
	*endpoint
	model model
	ask   *request
	ctx   context.Context // ends with the caller
	w     http.ResponseWriter
	head  chunk // of each event
	first bool  // an event has been sent
	sent  int   // tokens
}

func (a *completion) usage() *usage {
	prompt := len(strings.Fields(a.ask.prompt()))
	return &usage{prompt, a.sent, prompt + a.sent}
}

// whole answers in one piece, when all tokens are there.
func (a *completion) whole() error {
	limit, reason := a.ask.limit(a.model)
	var b strings.Builder
	for token := range text(a.model, a.ask.prompt()) {
		if a.sent == limit {
			break
		}
		if err := a.pause(); err != nil {
			return err
		}
		b.WriteString(token)
		a.sent++
	}
	a.head.Object = "chat.completion"
	a.head.Choices = []choice{{Message: &message{"assistant", b.String()}, Finish: &reason}}
	a.head.Usage = a.usage()
	return answer(a.w, http.StatusOK, a.head)
}

// stream answers with one event for each token, as soon as it is there.
func (a *completion) stream() error {
	limit, reason := a.ask.limit(a.model)
	a.w.Header().Set("Content-Type", "text/event-stream")
	a.w.Header().Set("Cache-Control", "no-cache")
	a.head.Object = "chat.completion.chunk"
	if err := a.event(choice{Delta: &message{Role: "assistant"}}); err != nil {
		return err
	}
	for token := range text(a.model, a.ask.prompt()) {
		if a.sent == limit {
			break
		}
		if err := a.pause(); err != nil {
			return err
		}
		if err := a.event(choice{Delta: &message{Content: token}}); err != nil {
			return err
		}
		a.sent++
	}
	if err := a.event(choice{Delta: &message{}, Finish: &reason}); err != nil {
		return err
	}
	if a.ask.StreamOptions.IncludeUsage {
		a.head.Usage = a.usage()
		if err := a.event(); err != nil {
			return err
		}
	}
	return a.data("[DONE]")
}

// pause is the time that a token takes.
func (a *completion) pause() error {
	if a.model.pause == 0 {
		return a.ctx.Err()
	}
	t := time.NewTimer(a.model.pause)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-a.ctx.Done():
		return a.ctx.Err()
	}
}

func (a *completion) event(choices ...choice) error {
	a.head.Choices = append([]choice{}, choices...) // not null when there is none
	b, err := json.Marshal(a.head)
	if err != nil {
		return err
	}
	return a.data(string(b))
}

// data sends one event. In lockstep the one before must have been confirmed.
func (a *completion) data(event string) error {
	if a.model.lockstep && a.first {
		select {
		case <-a.confirmed:
		case <-a.ctx.Done():
			return a.ctx.Err()
		}
	}
	a.first = true
	if _, err := fmt.Fprintf(a.w, "data: %s\n\n", event); err != nil {
		return err
	}
	return http.NewResponseController(a.w).Flush()
}
