package abac

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// explain turns an error of cedar-go's parser into one that shows the user's text.
// wrapped says that the text stood in Short's wrapper. Where the likely mistake is
// known it is named, else cedar-go's complaint is.
func (t *text) explain(cerr error, wrapped bool) *SyntaxError {
	c, ok := readComplaint(cerr.Error())
	if wrapped {
		c.line--
	}
	i := slices.IndexFunc(t.list, t.unreadable) // rejected without a place: texts and integers
	if ok {
		i = t.culprit(t.find(c.line, c.column), c.msg, c.scanning)
	}
	i = max(0, min(i, len(t.list)-1))
	if !ok || c.scanning {
		return t.fail(t.list[i], t.unread(t.list[i]), "")
	}

	// A character that Cedar does not know is an error wherever it stands: the
	// earlier of the two is the one to show.
	if u := slices.IndexFunc(t.list[:i], func(tok token) bool { return tok.kind == unknown }); u >= 0 {
		i = u
	}
	if what, hint := t.mistake(i, wrapped); what != "" {
		return t.fail(t.list[i], what, hint)
	}
	what, hint := t.reword(c.msg, i)
	return t.fail(t.list[i], what, hint)
}

// complaint is an error of cedar-go's taken apart. Its parser says
// `parse error at <input>:LINE:COL "TOKEN": MSG`, its scanner `<input>:LINE:COL: MSG`.
type complaint struct {
	msg          string
	line, column int
	scanning     bool
}

func readComplaint(s string) (c complaint, ok bool) {
	before, s, found := strings.Cut(s, "<input>:")
	if !found {
		return c, false
	}
	if _, err := fmt.Sscanf(s, "%d:%d", &c.line, &c.column); err != nil {
		return c, false
	}
	c.scanning = !strings.Contains(before, "parse error at")
	_, c.msg, _ = strings.Cut(s, `": `) // the token is quoted as by %q, so this is its end
	return c, true
}

// find returns the index of the token at a place as cedar-go counts it. Behind the
// text stands its end, and in Short's wrapper, on a line of their own, `}` and `;`:
// the first is taken for the end, the second is one further.
func (t *text) find(line, column int) int {
	l, from := 1, 0
	for i, tok := range t.list[:len(t.list)-1] {
		if n := strings.Count(t.src[from:tok.off], "\n"); n > 0 {
			l += n
			from = strings.LastIndexByte(t.src[:tok.off], '\n') + 1
		}
		if l == line && 1+utf8.RuneCountInString(t.src[from:tok.off]) == column {
			return i
		}
	}
	last := len(t.list) - 1
	if line == 2+strings.Count(t.src, "\n") && column > 1 {
		return last + 1
	}
	return last
}

// culprit returns the token that msg is about: cedar-go gives the place of the
// next one when it has already taken the token it does not like.
func (t *text) culprit(next int, msg string, scanning bool) int {
	if scanning || strings.HasPrefix(msg, "got ") || strings.HasPrefix(msg, "exact got  want") {
		return next
	}
	// `x` is not a function; x expects one argument: the last call of x before.
	name, _, _ := strings.Cut(msg, " ")
	name = strings.Trim(name, "`")
	name = name[strings.LastIndexByte(name, ':')+1:]
	if strings.Contains(msg, "` is ") || strings.Contains(msg, "expects ") {
		for i := min(next, len(t.list)) - 1; i >= 0; i-- {
			if t.at(i).text == name && t.at(i+1).text == "(" {
				return i
			}
		}
	}
	return next - 1
}

// unreadable says whether cedar-go cannot make a value of the token.
func (t *text) unreadable(tok token) bool {
	switch tok.kind {
	case str:
		return strings.Contains(tok.text, `\`)
	case number:
		return len(tok.text) > 18
	}
	return false
}

func (t *text) unread(tok token) string {
	switch tok.kind {
	case str:
		return `this text has an escape that Cedar does not know; \" \\ \n \r \t \0 \' \x41 and \u{41} exist, and \* in patterns`
	case number:
		return "this number does not fit into 64 bits"
	}
	return "this cannot be read"
}

// mistake names what people most often do wrong at token i, and the remedy.
func (t *text) mistake(i int, short bool) (what, hint string) {
	prev, tok, next := t.at(i-1), t.at(i), t.at(i+1)
	if i == 0 {
		prev = token{}
	}
	switch tok.text {
	case "=":
		return "= is not an operator", "write == to compare"
	case "'", "`":
		hint = "write double quotes"
		if body, _, closed := strings.Cut(t.src[tok.off+1:], tok.text); closed && !strings.ContainsAny(body, "\"\n\\") {
			hint = `write "` + body + `"`
		}
		return "texts stand in double quotes", hint + quoting
	case "“", "”", "‘", "’", "„", "«", "»":
		return "these are typographic quotes", `write straight double quotes: "`
	case "&", "|":
		return tok.text + " is not an operator", "write " + tok.text + tok.text
	case `\`:
		return noBackslash, backslashHint
	case "#":
		return "# does not begin a comment", "write //"
	case "\u00a0":
		return "this is a no-break space", "write a plain one"
	case "\ufeff":
		return "the text begins with a byte order mark", "save the file as UTF-8 without it"
	case "%", "/":
		return tok.text + " is not an operator", "Cedar calculates with + - * only"
	case "~", "^", "?", "$":
		return tok.text + " is not an operator", ""
	case ">":
		if prev.text == "<" {
			return "<> is not an operator", "write !="
		}
	case "permit", "forbid", "@":
		if short {
			return "this is a whole policy, where one expression is expected", "put it into a file and give @FILE"
		}
	case "when", "unless":
		if short {
			return tok.text + " belongs to whole policies", "write && for a second condition, and ! for its opposite; whole policies go into a file: @FILE"
		}
	}
	if tok.kind != word {
		return "", ""
	}
	switch strings.ToLower(tok.text) {
	case "and":
		return tok.text + " is not an operator", "write &&"
	case "or":
		return tok.text + " is not an operator", "write ||"
	case "not":
		return tok.text + " is not an operator", "write ! before the condition"
	case "true", "false":
		if lower := strings.ToLower(tok.text); lower != tok.text {
			return "there is no value " + tok.text, "write " + lower
		}
	case "null", "nil", "none", "undefined":
		return "there is no value " + tok.text, "ask whether an attribute is there: principal has role"
	}
	if prev.text == "." && slices.Contains([]string{"true", "false", "if", "then", "else", "in", "like", "has", "is", "__cedar"}, tok.text) {
		return fmt.Sprintf("%s is a word of the language", tok.text), fmt.Sprintf(`write ["%s"] in place of .%s`, tok.text, tok.text)
	}
	if !t.stray(i) {
		return "", ""
	}
	switch {
	case prev.text == "-" && t.at(i-2).kind == word && t.at(i-3).text == "." &&
		prev.off == t.at(i-2).off+len(t.at(i-2).text) && tok.off == prev.off+1: // principal.cost-center
		name := t.at(i-2).text + "-" + tok.text
		return "- subtracts here", fmt.Sprintf(`write an attribute with a hyphen as %s["%s"]`, t.at(i-4).text, name)
	case next.text == "." && slices.Contains([]string{"subject", "peer", "user", "client", "caller", "member", "self", "node"}, strings.ToLower(tok.text)):
		return "there is no variable " + tok.text, fmt.Sprintf("the peer is principal: principal.%s", t.at(i+2).text)
	case next.text == ".":
		return "there is no variable " + tok.text, "the variables are principal, resource, action and context"
	case slices.Contains([]string{"==", "!=", "<", "<=", ">", ">=", "[", ",", "like"}, prev.text), prev.text == "(" && t.at(i-2).kind == word:
		return "there is no variable " + tok.text, fmt.Sprintf(`if it is a text, its quotes are missing: "%s"; a shell takes them away unless the whole policy stands in single quotes: 'principal.role == "agent"'`, tok.text)
	}
	return "there is no variable " + tok.text, fmt.Sprintf("an attribute of the peer is principal.%s; the variables are principal, resource, action and context", tok.text)
}

// stray says whether the word at i stands where a value may, and is none.
func (t *text) stray(i int) bool {
	switch tok := t.at(i); tok.text {
	case "principal", "resource", "action", "context", "true", "false", "if", "then", "else", "has", "like", "is", "in", "when", "unless", "permit", "forbid", "__cedar":
		return false
	}
	if n := t.at(i + 1).text; n == "(" || n == "::" {
		return false
	}
	if i == 0 {
		return true
	}
	prev := t.at(i - 1)
	return prev.kind == op && !slices.Contains([]string{")", "]", "}", ".", ";", "@", "::"}, prev.text) ||
		slices.Contains([]string{"if", "then", "else", "in", "like"}, prev.text)
}

// reword says a complaint of cedar-go's about token i in words of this package.
func (t *text) reword(msg string, i int) (what, hint string) {
	tok, found := t.list[i], "the end"
	if tok.kind != end {
		found = tok.text
		if utf8.RuneCountInString(found) > 40 {
			found = string([]rune(found)[:40]) + "…"
		}
	}
	switch {
	case strings.HasPrefix(msg, "exact got "):
		want := msg[strings.LastIndexByte(msg, ' ')+1:]
		if want == "}" {
			return "the condition cannot go on with " + found, "two conditions are joined by && or ||"
		}
		return fmt.Sprintf("%s is expected here, not %s", want, found), ""
	case strings.HasPrefix(msg, "got "):
		return "a comma is expected here, not " + found, ""
	case strings.HasPrefix(msg, "invalid primary"):
		return "a value is expected here, not " + found, ""
	case strings.HasPrefix(msg, "expected string"):
		return "a text in double quotes is expected here, not " + found, ""
	case strings.HasPrefix(msg, "expected ident"):
		kinds := map[string]string{"principal": typeNode, "action": typeAction, "resource": typeName}
		if k := kinds[t.at(i-2).text]; k != "" && tok.kind == str {
			hint = "write " + k + "::" + found
		}
		return "a name is expected here, not " + found, hint
	case strings.HasPrefix(msg, "unexpected effect"):
		return "permit or forbid is expected here, not " + found, "a file holds whole policies, each as: " + wholeExample
	case strings.HasPrefix(msg, "unexpected token"):
		return "this is not expected here", ""
	}
	return strings.ReplaceAll(msg, "`", ""), ""
}
