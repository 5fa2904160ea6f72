package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestAgentStreamsAndGuestIsRefused runs the example; it checks each line before printing it.
func TestAgentStreamsAndGuestIsRefused(t *testing.T) {
	before := runtime.NumGoroutine()
	var out strings.Builder
	err := run(t.Context(), &out)
	t.Logf("\n%s", &out)
	if err != nil {
		t.Fatal(err)
	}
	proved := []string{"openai-go lists", "openai-go streams 14 events", "openai-go closes a stream behind token 4", "openai-go reads 8.6 MB",
		"errors are untouched: 404 model_not_found", "its Code PORTAL-E0301"}
	if curlInstalled() {
		proved = append(proved, "curl -N prints 15 events", "curl is killed", `curl exits 22 and prints {"error":{"code":"PORTAL-E0301"`)
	}
	for _, line := range proved {
		if !strings.Contains(out.String(), line) {
			t.Errorf("no line %q", line)
		}
	}
	for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
		}
	}
}

// post asks an endpoint without anything between.
func post(t *testing.T, body string) (status int, answer string) {
	t.Helper()
	s := httptest.NewServer((&endpoint{}).server().Handler)
	defer s.Close()
	r, err := s.Client().Post(s.URL+"/v1/chat/completions", "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return r.StatusCode, string(b)
}

func TestARefusedRequestHasTheFormOfOpenAI(t *testing.T) {
	for _, c := range []struct {
		body, code string
		status     int
		param      any
	}{
		{`{"model":"gpt","messages":[{"role":"user","content":"hello"}]}`, "model_not_found", http.StatusNotFound, "model"},
		{`{"model":"lockstep","messages":[{"role":"user","content":"hello"}]}`, "model_not_found", http.StatusNotFound, "model"}, // nobody confirms
		{`{"model":"brief"}`, "missing_required_parameter", http.StatusBadRequest, "messages"},
		{`{"model":"brief","messages":[{"content":7}]}`, "invalid_json", http.StatusBadRequest, nil},
		{`{"model":`, "invalid_json", http.StatusBadRequest, nil},
		{`{"model":"` + strings.Repeat("m", maxRequest) + `"}`, "invalid_json", http.StatusRequestEntityTooLarge, nil},
	} {
		status, answer := post(t, c.body)
		var told map[string]map[string]any
		if err := json.Unmarshal([]byte(answer), &told); err != nil {
			t.Fatalf("%s: %v", answer, err)
		}
		e := told["error"]
		if status != c.status || e["code"] != c.code || e["param"] != c.param || e["type"] != "invalid_request_error" || e["message"] == "" {
			t.Errorf("%.60s: %d %v", c.body, status, e)
		}
	}
}

func TestAStreamEndsWithItsReasonItsUsageAndDone(t *testing.T) {
	status, answer := post(t, `{"model":"brief","stream":true,"stream_options":{"include_usage":true},"max_tokens":2,
		"messages":[{"role":"user","content":[{"type":"text","text":"Who may "},{"type":"text","text":"read the stream?"}]}]}`)
	events := strings.Split(answer, "\n\n")
	if status != http.StatusOK || len(events) != 7 || events[5] != "data: [DONE]" || events[6] != "" {
		t.Fatalf("%d %q", status, events)
	}
	var got string
	for i, event := range events[:5] {
		var c chunk
		if err := json.Unmarshal([]byte(strings.TrimPrefix(event, "data: ")), &c); err != nil {
			t.Fatalf("%q: %v", event, err)
		}
		switch i {
		case 3:
			if f := c.Choices[0].Finish; f == nil || *f != "length" {
				t.Errorf("the reason is in %s", event)
			}
		case 4:
			if len(c.Choices) != 0 || c.Usage == nil || *c.Usage != (usage{6, 2, 8}) {
				t.Errorf("the usage is in %s", event)
			}
		default:
			got += c.Choices[0].Delta.Content
		}
	}
	// Parts are one text: the same prompt as in one piece.
	if want := strings.Join(strings.SplitAfter(expected("brief"), " ")[:2], ""); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestWhatIsNotServedIsSaid(t *testing.T) {
	s := httptest.NewServer((&endpoint{}).server().Handler)
	defer s.Close()
	r, err := s.Client().Get(s.URL + "/v1/embeddings")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, _ := io.ReadAll(r.Body)
	if r.StatusCode != http.StatusNotFound || !strings.Contains(string(b), `"message":"there is no GET /v1/embeddings"`) {
		t.Errorf("%s %s", r.Status, b)
	}
}
