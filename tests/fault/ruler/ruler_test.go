package ruler

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/iotest"
)

func TestWhatWasSentIsRightHoweverItComes(t *testing.T) {
	const n = 100_001
	var b bytes.Buffer
	if sent, err := Send(&b, 7, n); sent != n || err != nil {
		t.Fatal(sent, err)
	}
	for name, r := range map[string]io.Reader{"whole": bytes.NewReader(b.Bytes()), "a byte a time": iotest.OneByteReader(bytes.NewReader(b.Bytes()))} {
		if got, err := Receive(r, 7); got != n || err != nil {
			t.Errorf("%s: %d, %v", name, got, err)
		}
	}
	cut := errors.New("cut")
	if got, err := Receive(io.MultiReader(bytes.NewReader(b.Bytes()[:999]), iotest.ErrReader(cut)), 7); got != 999 || err != cut {
		t.Errorf("%d, %v", got, err)
	}
}

func TestWhatWasNotSentThereIsWrong(t *testing.T) {
	whole := make([]byte, 4096)
	Fill(whole, 7, 0)
	other := make([]byte, 4096)
	Fill(other, 8, 0)
	for name, b := range map[string][]byte{
		"a bit":             append(append(bytes.Clone(whole[:999]), whole[999]^1), whole[1000:]...),
		"a byte left out":   append(bytes.Clone(whole[:999]), whole[1000:]...),
		"a part left out":   append(bytes.Clone(whole[:1024]), whole[2048:]...),
		"a part twice":      append(bytes.Clone(whole[:2048]), whole[1024:]...),
		"a part that moved": append(append(bytes.Clone(whole[:1024]), whole[2048:3072]...), whole[1024:2048]...),
		"another transfer":  append(bytes.Clone(whole[:1024]), other[1024:]...),
		"zeros":             make([]byte, 10),
	} {
		if got, err := Receive(bytes.NewReader(b), 7); !errors.Is(err, ErrWrong) || got > 2048 {
			t.Errorf("%s: %d right bytes, %v", name, got, err)
		}
	}
}

func TestSendWithoutAnEndEndsWithItsWriter(t *testing.T) {
	full := errors.New("full")
	w := writerFunc(func(b []byte) (int, error) { return 0, full })
	if _, err := Send(w, 1, -1); err != full {
		t.Error(err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }
