package journeys_test

import (
	"bytes"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/portal-tunnel/portal/tests/process"
)

// Tickets and keys are nowhere that another user of the host or a reader of the logs can look: in
// no command line, in no line that a command prints at its most talkative, in no environment of a
// target's command.
func TestSecretsAreInNoCommandLineLogOrTarget(t *testing.T) {
	t.Parallel()
	h := newHouse(t, "--log-level", "debug")
	seen := map[string]string{} // what others can see, by where
	run := func(name, host, stdin string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(h.ctx, portal.Path, append([]string{"--home", h.home(host), "--log-level", "debug"}, args...)...)
		cmd.Env, cmd.Stdin = process.Environ(), strings.NewReader(stdin)
		var stdout, stderr strings.Builder
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); cmd.ProcessState == nil {
			t.Fatal(err)
		}
		if _, ok := seen[name]; ok || stderr.Len() == 0 {
			t.Fatalf("%s printed nothing on stderr, or is there twice", name)
		}
		seen[name] = stderr.String()
		return strings.TrimSpace(stdout.String())
	}
	ticket := func(host string, grants ...string) string {
		return run("ticket for "+host, "authority", "", append([]string{"ticket", "create", "--name", host}, grants...)...)
	}
	db1, bot, eve := ticket("db1", "--serve", "db"), ticket("bot", "--attr", "role=agent"), ticket("eve", "--attr", "role=guest")

	// A ticket in the environment, one on stdin, one in a file.
	cmd := exec.Command(portal.Path, "--home", h.home("db1"), "--log-level", "debug", "outlet", "db", "--listen", "127.0.0.1:0",
		"--allow", `principal.role == "agent"`, "--", "env")
	cmd.Env = append(process.Environ(), "PORTAL_TICKET="+db1)
	out, err := process.Start("portal outlet", cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Stop(patience) })
	lanes := h.line(out, `outlet db ready on ([^; ]+)`)
	run("enroll on stdin", "bot", bot+"\n", "enroll", "-")
	in, addr := h.inlet("bot", "0", lanes, "--log-level", "debug")
	h.line(in, `inlet db ready direct`)
	file := filepath.Join(h.dir, "eve.ticket")
	if err := os.WriteFile(file, []byte(eve), 0o600); err != nil {
		t.Fatal(err)
	}
	guest, _ := h.inlet("eve", "0", lanes, "--log-level", "debug", "--ticket", file)
	h.line(guest, `inlet db refused`)

	// What goes wrong with a ticket is said without it.
	run("a used ticket", "late", bot, "enroll", "-")
	run("a damaged ticket", "late2", bot[:40]+bot[41:], "enroll", "-")
	run("a ticket as an argument", "late3", "", "enroll", eve)
	run("a ticket as a flag", "late4", "", "enroll", "--ticket="+eve)

	c := dial(t, addr, nil)
	environment, err := io.ReadAll(c)
	c.Close()
	if err != nil || !bytes.Contains(environment, []byte("PORTAL_NAME=db")) {
		t.Fatalf("the target's environment: %v\n%s", err, environment)
	}
	seen["the target's environment"] = string(environment)

	for name, p := range map[string]*process.Process{"authority": h.keeper, "outlet": out, "inlet": in, "guest's inlet": guest} {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.Pid()))
		if err != nil || len(line) == 0 {
			t.Fatalf("the command line of %s: %v", name, err)
		}
		seen["command line of "+name] = string(line)
		p.Stop(patience)
		log := p.Lines()
		if len(log) >= 1000 {
			t.Fatalf("%s: the first lines of its log are lost", name)
		}
		seen["log of "+name] = strings.Join(log, "\n")
	}
	for _, name := range []string{"authority", "outlet"} {
		if !strings.Contains(seen["log of "+name], `"level":"DEBUG"`) {
			t.Errorf("%s says nothing at its most talkative: nothing is proved", name)
		}
	}

	secrets := map[string][]string{}
	for name, text := range map[string]string{"db1's ticket": db1, "bot's ticket": bot, "eve's ticket": eve} {
		if len(text) < 100 {
			t.Fatalf("%s is %q", name, text)
		}
		// A part of it is too much already.
		for i := 0; i+24 <= len(text); i++ {
			secrets[name] = append(secrets[name], text[i:i+24])
		}
	}
	for _, host := range []string{"db1", "bot", "eve", "authority/authority"} {
		secrets["the key of "+host] = seed(t, filepath.Join(h.dir, host, "identity.key"))
	}
	for where, text := range seen {
		for name, forms := range secrets {
			for _, form := range forms {
				if strings.Contains(strings.ToLower(text), strings.ToLower(form)) {
					t.Errorf("%s: there is %s", where, name)
					break
				}
			}
		}
	}
}

// seed is an identity's private seed in the forms in which a program would print it.
func seed(t testing.TB, file string) []string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	// An array of two, of which the first is a byte string of 32 (RFC 8949, section 3).
	if block == nil || !bytes.HasPrefix(block.Bytes, []byte{0x82, 0x58, 32}) {
		t.Fatalf("%s has another form than this test knows", file)
	}
	return written(block.Bytes[3:][:32])
}

// written is a secret of at least 26 bytes in the forms in which a program would write it.
func written(secret []byte) []string {
	forms := []string{
		string(secret), hex.EncodeToString(secret), strings.Trim(fmt.Sprint(secret), "[]"),
		strings.TrimRight(base32.StdEncoding.EncodeToString(secret), "="),
	}
	// In base64 a run of bytes has three forms, by where it begins.
	for i := range 3 {
		forms = append(forms, base64.RawStdEncoding.EncodeToString(secret[i:i+24]), base64.RawURLEncoding.EncodeToString(secret[i:i+24]))
	}
	return forms
}
