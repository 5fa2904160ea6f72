package abac

import (
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
)

// Limits on the text of policies, checked before cedar-go parses it: its parser,
// its folding and its evaluation recurse.
const (
	maxSource = 64 << 10 // bytes of a file, comments and blanks included
	maxShort  = 8 << 10  // bytes of an expression: what fits on a command line
	// A token costs 300 to 450 bytes while it is parsed, however short it is: no text costs more than
	// 1 MiB. Policies have some 30, so that a file holds some 60; whoever has more has several files.
	// An expression has a few dozen, or a set of some hundred.
	maxSourceTokens = 2_000
	maxShortTokens  = 1_250
	maxDepth        = 32 // open brackets and ifs; people write 3 or 4
	// Chains such as a && b && c are parsed by a loop but into a tree as deep as
	// the chain is long. 512 a policy keeps its depth a small part of a stack.
	maxOperators = 512
	// The parser copies A::B::C once for each part. Types here have one.
	maxParts = 8
	maxID    = 128 // bytes of an @id: it is told to peers
)

// SyntaxError says where a policy is wrong, in the user's own text, and what
// most likely helps.
type SyntaxError struct {
	Name   string // of the file or flag; may be empty
	Line   int    // counted from 1
	Column int    // in characters, counted from 1
	Text   string // the line
	Msg    string // what is wrong
	Hint   string // what to do; may be empty
}

// Error shows the place, the line with a caret below it, and the hint. Long lines
// are cut around the place, and characters that a terminal would obey are replaced.
func (e *SyntaxError) Error() string {
	var b strings.Builder
	name := e.Name
	if name == "" {
		name = "policy"
	}
	fmt.Fprintf(&b, "%s:%d:%d: %s", name, e.Line, e.Column, printable(e.Msg))
	if strings.TrimSpace(e.Text) != "" {
		line, pad := window([]rune(printable(e.Text)), e.Column-1)
		fmt.Fprintf(&b, "\n  %s\n  %s^", line, pad)
	}
	if e.Hint != "" {
		b.WriteString("\n  " + printable(e.Hint))
	}
	return b.String()
}

// window cuts line to the surroundings of its character at and returns what
// brings a caret below that: tabs where the line has tabs, blanks elsewhere.
func window(line []rune, at int) (shown, pad string) {
	const before, after = 60, 60
	at = max(0, min(at, len(line)))
	if at > before {
		line, at = append([]rune("…"), line[at-before:]...), before+1
	}
	if len(line) > at+after {
		line = append(slices.Clone(line[:at+after]), '…')
	}
	blank := make([]rune, at)
	for i := range blank {
		blank[i] = ' '
		if line[i] == '\t' {
			blank[i] = '\t'
		}
	}
	return string(line), string(blank)
}

func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return utf8.RuneError
	}, s)
}

type kind uint8

const (
	unknown kind = iota // one character that no Cedar token begins with
	word                // identifiers and keywords
	number              // decimal digits
	str                 // a text in double quotes, with them
	op                  // what Cedar knows
	end                 // of the text
)

type token struct {
	kind kind
	off  int // in bytes
	text string
}

// text is a source cut into tokens as cedar-go does it (package scanner there),
// but knowing where each one is; list ends with the end token.
type text struct {
	name string
	src  string
	list []token
}

// scan cuts src into tokens and enforces every limit; limit is of its bytes. `x has
// a.b` is parsed into a tree that holds x twice, so nesting it doubles the tree each
// time: tokens are counted as often as they are copied, and the parts of a pattern too.
func scan(name, src string, limit, tokens int) (*text, error) {
	t := &text{name: name, src: src}
	if len(src) > limit {
		t.src = ""
		return nil, t.fail(token{}, fmt.Sprintf("it is %d bytes long, %d are allowed", len(src), limit), "")
	}
	for i := 0; i < len(src); {
		r, n := utf8.DecodeRuneInString(src[i:])
		if r == 0 || r == utf8.RuneError && n == 1 {
			return nil, t.fail(token{off: i}, "this byte is not text", "policies are written in UTF-8")
		}
		i += n
	}
	if err := t.cut(tokens); err != nil {
		return nil, err
	}
	if err := t.measure(tokens); err != nil {
		return nil, err
	}
	return t, nil
}

func isWord(c byte, first bool) bool {
	return c == '_' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || !first && isDigit(c)
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// cut fills list, which holds at most limit and the end. It reads the text twice, since a
// list that grows takes three times as much.
func (t *text) cut(limit int) error {
	n := 0
	for i := 0; ; n++ {
		tok, next, err := t.next(i)
		if err != nil {
			return err
		}
		if tok.kind == end {
			break
		}
		if i = next; n == limit {
			return t.fail(tok, fmt.Sprintf("it has more than %d words and signs", limit), "give several, each of its own: any permit of them permits, and each forbid forbids")
		}
	}
	t.list = make([]token, 0, n+1)
	for i := 0; len(t.list) <= n; {
		tok, next, _ := t.next(i)
		t.list, i = append(t.list, tok), next
	}
	return nil
}

// next is the token at i or behind it, and where it ends. Cedar's tokens: comments to the end of the
// line or between /* and */, texts that end on their line, identifiers, integers, operators.
func (t *text) next(i int) (tok token, after int, err error) {
	s := t.src
	for i < len(s) {
		start, c := i, s[i]
		k := op
		switch {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
			i++
			continue
		case strings.HasPrefix(s[i:], "//"):
			if n := strings.IndexByte(s[i:], '\n'); n >= 0 {
				i += n
			} else {
				i = len(s)
			}
			continue
		case strings.HasPrefix(s[i:], "/*"):
			n := strings.Index(s[i+2:], "*/")
			if n < 0 {
				return tok, i, t.fail(token{off: i}, "this comment is never closed", "end it with */")
			}
			i += n + 4
			continue
		case c == '"':
			k = str
			for i++; ; i++ {
				if i >= len(s) || s[i] == '\n' {
					if start > 0 && s[start-1] == '\\' {
						return tok, i, t.fail(token{off: start - 1}, noBackslash, backslashHint)
					}
					return tok, i, t.fail(token{off: start}, "this text is never closed", `the closing " is missing on this line`)
				}
				if s[i] == '"' {
					i++
					break
				}
				if s[i] == '\\' {
					i++
				}
			}
		case isWord(c, true):
			k = word
			for i < len(s) && isWord(s[i], false) {
				i++
			}
		case isDigit(c):
			k = number
			for i < len(s) && isDigit(s[i]) {
				i++
			}
		default:
			n := operator(s[i:])
			if n == 0 {
				k = unknown
				_, n = utf8.DecodeRuneInString(s[i:])
			}
			i += n
		}
		return token{k, start, s[start:i]}, i, nil
	}
	return token{end, len(s), ""}, len(s), nil
}

// operator returns the length of the operator that s begins with; 0 if none.
func operator(s string) int {
	for _, o := range []string{"::", "!=", "<=", ">=", "==", "||", "&&"} {
		if strings.HasPrefix(s, o) {
			return 2
		}
	}
	if strings.IndexByte("@.,;(){}[]+-*:!<>", s[0]) >= 0 {
		return 1
	}
	return 0
}

// level is one open bracket, or the ground.
type level struct {
	open    token
	ifs     int
	sum     int // size of the finished operands in it, in tokens after copying
	operand int // and of the one it is in
}

// measure checks that brackets match, and the limits on nesting, operators and
// expansion, which is of the whole text: many policies must not cost what one may not.
func (t *text) measure(expanded int) error {
	levels := []level{{}}
	ifs, operators, parts := 0, 0, 0
	before := 0 // the size of the policies before this one
	for i, tok := range t.list {
		l := &levels[len(levels)-1]
		if tok.kind != end {
			l.operand++
		}
		switch tok.text {
		case "(", "[", "{":
			levels = append(levels, level{open: tok})
		case ")", "]", "}":
			if len(levels) == 1 {
				return t.fail(tok, "this "+tok.text+" closes nothing", "remove it, or add the opening one")
			}
			if l.open.text+tok.text != "()" && l.open.text+tok.text != "[]" && l.open.text+tok.text != "{}" {
				return t.fail(tok, fmt.Sprintf("this %s does not close the %s before it", tok.text, l.open.text), "")
			}
			size := l.sum + l.operand
			ifs -= l.ifs
			levels = levels[:len(levels)-1]
			levels[len(levels)-1].operand += size
		case ",", "&&", "||", "if", "then", "else":
			l.sum, l.operand = l.sum+l.operand, 0
			if tok.text == "if" {
				l.ifs++
				ifs++
			}
			if tok.text == "," {
				ifs, l.ifs = ifs-l.ifs, 0
			}
		case ";":
			if len(levels) == 1 {
				before += l.sum + l.operand
				*l, ifs, operators = level{}, 0, 0
			}
		case "has":
			if n := t.chain(i + 1); n > 1 {
				l.operand = (l.operand + n) * n
			}
		}
		switch tok.text {
		case "&&", "||", "+", "-", "*", "!", ".", "[":
			operators++
		}
		switch {
		case tok.text == "::":
			parts++
		case tok.kind != word:
			parts = 0
		}
		if tok.kind == str && i > 0 && t.list[i-1].text == "like" {
			n := strings.Count(tok.text, "*") // each is a part of the pattern
			operators, levels[len(levels)-1].operand = operators+n, levels[len(levels)-1].operand+n
		}
		switch l := levels[len(levels)-1]; {
		case len(levels)-1+ifs > maxDepth:
			return t.fail(tok, fmt.Sprintf("it is nested more than %d deep", maxDepth), "")
		case operators > maxOperators:
			return t.fail(tok, fmt.Sprintf("one policy has more than %d operators", maxOperators), "make it several policies, or a set: [\"a\", \"b\"].contains(principal.role)")
		case parts > maxParts:
			return t.fail(tok, fmt.Sprintf("a name has more than %d parts", maxParts), "")
		case before+l.sum+l.operand > expanded:
			return t.fail(tok, fmt.Sprintf("it stands for more than %d words and signs", expanded), "`has` with dots repeats what is before it, and each * of a pattern counts: write && between simpler conditions")
		}
	}
	if len(levels) > 1 {
		open := levels[len(levels)-1].open
		return t.fail(open, "this "+open.text+" is never closed", "the closing one is missing")
	}
	return nil
}

// chain counts the words of a.b.c at i.
func (t *text) chain(i int) int {
	n := 0
	for ; t.at(i).kind == word; i += 2 {
		n++
		if t.at(i+1).text != "." {
			break
		}
	}
	return n
}

// at is the i-th token, or the end.
func (t *text) at(i int) token {
	if i < 0 || i >= len(t.list) {
		return t.eof()
	}
	return t.list[i]
}

func (t *text) eof() token { return token{end, len(t.src), ""} }

// fail makes the error for the place of tok.
func (t *text) fail(tok token, msg, hint string) *SyntaxError {
	off := min(tok.off, len(t.src))
	if tok.kind == end && off > 0 { // behind the last character, not below an empty line
		off = len(strings.TrimRight(t.src[:off], " \t\r\n"))
	}
	line := 1 + strings.Count(t.src[:off], "\n")
	from := strings.LastIndexByte(t.src[:off], '\n') + 1
	shown, _, _ := strings.Cut(t.src[from:], "\n")
	return &SyntaxError{
		Name: t.name, Line: line, Column: 1 + utf8.RuneCountInString(t.src[from:off]),
		Text: strings.TrimSuffix(shown, "\r"), Msg: msg, Hint: hint,
	}
}

// checkShort refuses what is not one expression before it is put into braces.
func (t *text) checkShort() error {
	first := t.list[0]
	if first.kind == end {
		return t.fail(first, "the policy is empty", example)
	}
	if next := t.at(1).text; first.text == "@" || (first.text == "permit" || first.text == "forbid") && next == "(" {
		return t.fail(first, "this is a whole policy, where one expression is expected", "write only what stands in its braces, or put it into a file and give @FILE")
	}
	for _, tok := range t.list {
		if tok.text == ";" {
			return t.fail(tok, "an expression has no ;", "whole policies go into a file: @FILE")
		}
	}
	return nil
}

const (
	wholeExample = `permit(principal, action == Action::"open", resource) when { principal.role == "agent" };`

	example       = `write for example 'principal.role == "agent"'`
	noBackslash   = `there is no backslash outside of texts`
	backslashHint = `quotes within single quotes need none: 'principal.role == "agent"'`

	quoting = `; in a shell, put the whole policy into single quotes: 'principal.role == "agent"'`
)

// check refuses what cedar-go accepts but what can never be meant, since it can
// never match or never be evaluated.
func (t *text) check() error {
	for i, tok := range t.list {
		next := t.at(i + 1)
		switch {
		case tok.text == "::" && next.kind == str:
			path := t.at(i - 1)
			name := path.text
			for j := i - 2; t.at(j).text == "::" && t.at(j-1).kind == word; j -= 2 {
				path = t.at(j - 1)
				name = path.text + "::" + name
			}
			if err := t.checkType(path, name); err != nil {
				return err
			}
			if id := strings.Trim(next.text, `"`); name == typeAction && !slices.Contains(actions, id) {
				return t.fail(next, "there is no action "+next.text, "the actions are "+strings.Join(actions, ", "))
			}
		case tok.text == "is" && next.kind == word:
			name := next.text
			for j := i + 2; t.at(j).text == "::" && t.at(j+1).kind == word; j += 2 {
				name += "::" + t.at(j+1).text
			}
			if err := t.checkType(next, name); err != nil {
				return err
			}
		case tok.text == "in" && (next.kind == str || next.text == "[" && t.at(i+2).kind == str):
			return t.fail(tok, "`in` does not compare texts", `write == for one text, and for several ["a", "b"].contains(principal.role)`)
		}
	}
	return nil
}

func (t *text) checkType(at token, name string) error {
	if name == typeNode || name == typeAction || name == typeName {
		return nil
	}
	return t.fail(at, fmt.Sprintf("there is no entity type %q", name), `peers are Node::"P…", what they ask for is Name::"orders-db", actions are Action::"open"`)
}

// annotate applies the annotations of p to r. Others than @id and @max_session are
// for people and ignored, unless they look like a mistyped limit.
func (t *text) annotate(r *rule, p *cedar.Policy) error {
	given := p.Annotations()
	i := slices.IndexFunc(t.list, func(tok token) bool { return tok.off == p.Position().Offset })
	for t.at(i).text == "@" {
		key, value := t.at(i+1), string(given[types.AnnotationKey(t.at(i+1).text)])
		place := key
		if i += 2; t.at(i).text == "(" { // else a bare @key, whose value is empty
			place = t.at(i + 1)
			i += 3
		}
		switch key.text {
		case "id":
			if value == "" || len(value) > maxID || printable(value) != value {
				return t.fail(place, fmt.Sprintf("an id is 1 to %d printable characters", maxID), "")
			}
			r.id = value
		case "max_session":
			d, err := time.ParseDuration(value)
			if err != nil || d < time.Second {
				return t.fail(place, "this is not a length of time", `write hours, minutes and seconds, at least one second: @max_session("8h"), @max_session("1h30m")`)
			}
			if p.Effect() != cedar.Permit {
				return t.fail(key, "a forbid has no @max_session", "put it on a permit")
			}
			r.session = d
		default:
			if k := strings.ToLower(key.text); strings.HasPrefix(k, "max") || strings.Contains(k, "session") {
				return t.fail(key, "there is no annotation @"+key.text, `the limit of a session is @max_session("8h")`)
			}
		}
	}
	return nil
}
