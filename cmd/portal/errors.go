package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/portal-tunnel/portal/abac"
	"github.com/portal-tunnel/portal/identity"
	"github.com/portal-tunnel/portal/internal/authority"
	"github.com/portal-tunnel/portal/internal/channel"
	"github.com/portal-tunnel/portal/internal/store"
	"github.com/portal-tunnel/portal/internal/stream"
)

// Exit codes. The hundreds digit of an error code is the exit code.
const (
	exitFine        = 0
	exitFailed      = 1
	exitUsage       = 2
	exitRefused     = 3
	exitUnreachable = 4
	exitDrain       = 5
	exitInterrupted = 130
)

// A code names one cause for good: scripts and searches rely on it. Its text
// is PORTAL-E and four digits, of which the first two are the exit code.
type code int

// The codes that exist. A number is never used for another cause.
const (
	codeFailed       code = 100
	codeInUse        code = 101
	codeHomeBusy     code = 102
	codeLocked       code = 103
	codeState        code = 104
	codeListen       code = 105
	codeUsage        code = 200
	codeUnknownFlag  code = 201
	codeUnknown      code = 202
	codeAddress      code = 203
	codeWildcard     code = 204
	codePolicy       code = 205
	codeTicketForm   code = 206
	codeSecretArg    code = 207
	codeNoHome       code = 208
	codeHomeOpen     code = 209
	codeNoMember     code = 210
	codeOtherAuth    code = 211
	codeNoAuthority  code = 212
	codeNotYet       code = 213
	codeName         code = 214
	codeAttribute    code = 215
	codePin          code = 216
	codeRefused      code = 301
	codeExpired      code = 302
	codeTicketOver   code = 303
	codeTicketUsed   code = 304
	codeTicketGone   code = 305
	codeTicketNone   code = 306
	codeOtherPeer    code = 307
	codeSkew         code = 308
	codeForeign      code = 309
	codeNoRequest    code = 310
	codeUnreachable  code = 401
	codeTargetDown   code = 402
	codeTargetSlow   code = 403
	codeBusy         code = 404
	codeDrainTimeout code = 501
)

// causes is what `portal explain` says of each code: the cause, then what to do.
var causes = map[code][2]string{
	codeFailed:       {"something failed at run time", "read the text before the code; it names the step"},
	codeInUse:        {"the address to listen on is taken", "stop the process that is named, or listen elsewhere; port 0 takes a free one"},
	codeHomeBusy:     {"another authority runs on this home", "stop the process that is named, or use another --home"},
	codeLocked:       {"another process held the home's lock for more than 5 s", "see what the process that is named is doing; the lock is only held for one write"},
	codeState:        {"state could not be written; nothing was changed", "make room on the disk that holds the home, or mend its permissions"},
	codeListen:       {"the address cannot be listened on", "use an address of this host, and a port above 1023 unless you may use lower ones"},
	codeUsage:        {"the command line does not say what to do", "see `portal COMMAND --help`"},
	codeUnknownFlag:  {"the command has no such flag", "see `portal COMMAND --help`"},
	codeUnknown:      {"there is no such command", "see `portal --help`"},
	codeAddress:      {"an address is not one", "PORT, HOST:PORT or unix:/path"},
	codeWildcard:     {"an inlet would listen on every interface, where everybody who reaches this host could use it", "listen on loopback, or say --unsafe-listen"},
	codePolicy:       {"a policy does not parse, or would leave the expression it was given as", "the caret shows where; P is one Cedar expression, or @FILE with whole policies"},
	codeTicketForm:   {"a ticket is cut short, altered or of another version", "copy the whole line again; `portal ticket create` prints it"},
	codeSecretArg:    {"a ticket stood on the command line, where every user of the host can read it", "give it on stdin (`portal enroll -`), in a file, or in PORTAL_TICKET; and make a new one: this one has been seen"},
	codeNoHome:       {"nothing says where to keep the identity", "--home DIR or PORTAL_HOME"},
	codeHomeOpen:     {"a file of the home is not as it must be: others can read it, it is another user's, damaged or missing", "what the message names: a chmod, the owner, a backup"},
	codeNoMember:     {"this home is not a member of any authority", "`portal enroll` with a ticket, or --ticket FILE"},
	codeOtherAuth:    {"the home belongs to one authority, the ticket or address to another", "use another --home for the other authority"},
	codeNoAuthority:  {"this home holds no authority", "run it where `portal authority` runs, as the same user and with the same --home"},
	codeNotYet:       {"the command or flag is reserved and not available in this version", "leave it out"},
	codeName:         {"a name is not one", "segments of a-z 0-9 . _ - joined by /, at most 63 bytes"},
	codeAttribute:    {"an attribute is not one", "name=text, or name:=JSON with a string, integer, boolean or list of strings"},
	codePin:          {"two pins of the same peer disagree", "--peer and the ID of --direct must be the same"},
	codeRefused:      {"a policy or a credential says no", "the text names the policy or the attribute that is missing; a new ticket can carry it"},
	codeExpired:      {"a credential is over and could not be renewed", "see that the authority can be reached"},
	codeTicketOver:   {"the ticket's time is over", "`portal ticket create` makes another"},
	codeTicketUsed:   {"the ticket has been used as often as it may", "`portal ticket create` makes another"},
	codeTicketGone:   {"the ticket was revoked", "`portal ticket create` makes another"},
	codeTicketNone:   {"the authority does not know this ticket", "see that it was made on the authority it names"},
	codeOtherPeer:    {"another identity answered than the one that was demanded", "somebody stands in between, or the peer has a new home: compare with `portal identity show` there"},
	codeSkew:         {"the clocks of this host and of the authority disagree by more than 60 s", "set the clock"},
	codeForeign:      {"a request to an inlet of --kind http names another host, or a web page of another site has a browser send it", "use localhost or an address in the URL; --host NAME on the inlet when the name is meant"},
	codeNoRequest:    {"what was sent to an inlet of --kind http is no HTTP/1 request, or its length can be understood in two ways", "--kind raw passes any bytes"},
	codeUnreachable:  {"nobody answered at the address", "see that the other side runs, and that the address is right"},
	codeTargetDown:   {"the outlet's target refused the connection", "start the service behind the outlet"},
	codeTargetSlow:   {"the outlet's target did not answer in time", "see why the service behind the outlet does not accept"},
	codeBusy:         {"a limit on streams or dials is reached", "try again later, or raise the limit"},
	codeDrainTimeout: {"streams were still open at the end of the grace time and were reset", "a longer --grace, if they should have ended"},
}

func (c code) String() string { return fmt.Sprintf("PORTAL-E%04d", int(c)) }

// exit is the process's exit status for the cause.
func (c code) exit() int { return int(c) / 100 }

// A failure is an error as a person sees it: what was being done and why it
// failed, a stable code, and what to do about it.
type failure struct {
	code   code
	err    error
	remedy string // empty: nothing beyond the text
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// fail makes a failure; the format takes %w.
func fail(c code, remedy, format string, args ...any) error {
	return &failure{code: c, err: fmt.Errorf(format, args...), remedy: remedy}
}

// exitStatus ends the process with a status that needs no words, because they
// were said before.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// classify finds the cause of an error that a room returned. What was said
// around it stays.
func classify(err error) *failure {
	var f *failure
	if errors.As(err, &f) {
		return &failure{code: f.code, err: spoken(err), remedy: f.remedy}
	}
	for _, k := range kinds {
		if k.is(err) {
			return &failure{code: k.code, err: spoken(err)}
		}
	}
	return &failure{code: codeFailed, err: spoken(err)}
}

// kinds are tried in this order: what is final comes before what caused it or
// came with it.
var kinds = []struct {
	code code
	is   func(error) bool
}{
	{codePolicy, as[*abac.SyntaxError]},
	{codeHomeOpen, either(as[*identity.FileError], as[*store.AccessError])},
	{codeHomeBusy, as[*store.HeldError]},
	{codeLocked, as[*identity.LockedError]},
	{codeOtherAuth, either(as[*authority.OtherAuthorityError], is(identity.ErrOtherAuthority))},
	{codeNoAuthority, is(identity.ErrNoAuthority)},
	{codeNoMember, is(identity.ErrNotMember)},
	{codeTicketForm, either(is(identity.ErrNotTicket), is(identity.ErrTicketCut), is(identity.ErrTicketAltered), is(identity.ErrTicketVersion))},
	{codeTicketOver, is(authority.ErrTicketExpired)},
	{codeTicketUsed, is(authority.ErrTicketUsed)},
	{codeTicketGone, is(authority.ErrTicketRevoked)},
	{codeTicketNone, is(authority.ErrTicketUnknown)},
	{codeSkew, as[*authority.SkewError]},
	{codeUsage, either(as[*authority.GrantError], is(authority.ErrNoSuchTicket))},
	{codeRefused, as[*authority.RefusedError]},
	{codeOtherPeer, is(channel.ErrPin)},
	{codeRefused, refusedStream(stream.CodeRefused, stream.CodeRevoked)},
	{codeExpired, either(refusedStream(stream.CodeExpired), as[*identity.ExpiredError])},
	{codeBusy, either(refusedStream(stream.CodeBusy), as[*authority.LimitError])},
	{codeTargetDown, refusedStream(stream.CodeTargetRefused, stream.CodeTarget)},
	{codeTargetSlow, refusedStream(stream.CodeTargetTimeout)},
	{codeRefused, either(as[*channel.Refused], refusedChannel)},
	{codeState, either(is(syscall.ENOSPC), is(syscall.EDQUOT), is(syscall.EROFS), is(fs.ErrPermission))},
	{codeUnreachable, either(as[*authority.UnreachableError], is(authority.ErrUnavailable), is(context.DeadlineExceeded),
		is(channel.ErrCut), is(channel.ErrDead), as[*net.OpError], as[*net.DNSError], as[*channel.Closed], as[*stream.ResetError])},
}

func as[E error](err error) bool {
	var e E
	return errors.As(err, &e)
}

func is(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

func either(tests ...func(error) bool) func(error) bool {
	return func(err error) bool {
		return slices.ContainsFunc(tests, func(test func(error) bool) bool { return test(err) })
	}
}

func refusedStream(codes ...stream.Code) func(error) bool {
	return func(err error) bool {
		var r *stream.RefusedError
		return errors.As(err, &r) && slices.Contains(codes, r.Code)
	}
}

func refusedChannel(err error) bool {
	var c *channel.Closed
	return errors.As(err, &c) && c.Code == channel.CloseRefused
}

// rooms begin the errors of packages that say where they come from, which is
// nothing to a person at a terminal. They do so where an error begins; elsewhere
// the same word is part of a sentence.
var rooms = regexp.MustCompile(`(?m)(^|: )(?:(?:identity|abac|authority|channel|stream): )+`)

// dialing repeats an address that stands before it in every error here.
var dialing = regexp.MustCompile(`dial (tcp|unix) \S+: (connect: )?`)

// spoken is an error in words for a person; what it wraps stays to be found.
func spoken(err error) error {
	return &words{once(dialing.ReplaceAllString(rooms.ReplaceAllString(err.Error(), "$1"), "")), err}
}

var address = regexp.MustCompile(`^\S+:\d+$`)

// once leaves out an address that the words before the colon have just said: of `by
// relay A: A: refused` the second A, which is a way's name there.
func once(text string) string {
	parts := strings.Split(text, ": ")
	said := parts[:1]
	for _, p := range parts[1:] {
		if last := said[len(said)-1]; address.MatchString(p) && (last == p || strings.HasSuffix(last, " "+p)) {
			continue
		}
		said = append(said, p)
	}
	return strings.Join(said, ": ")
}

type words struct {
	text string
	err  error
}

func (w *words) Error() string { return w.text }
func (w *words) Unwrap() error { return w.err }

// report says an error to a person and returns the exit status.
func (s *session) report(err error) int {
	var status exitStatus
	switch {
	case err == nil:
		return exitFine
	case errors.As(err, &status):
		return int(status)
	}
	f := classify(err)
	text := strings.TrimRight(f.err.Error(), "\n")
	// A caret must stay under its column, so a text of several lines is
	// printed as it is, the code behind its first line.
	first, rest, several := strings.Cut(text, "\n")
	s.say("%s (%s)", plain(first), f.code)
	if several {
		for line := range strings.SplitSeq(rest, "\n") {
			s.line(plain(line))
		}
	}
	if f.remedy != "" {
		s.say("%s", plain(f.remedy))
	}
	return f.code.exit()
}
