package abac

import (
	"errors"
	"fmt"
	"sort"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/cedar-policy/cedar-go"

	"github.com/portal-tunnel/portal/internal/alloc"
)

func syntaxError(t testing.TB, err error) *SyntaxError {
	t.Helper()
	var e *SyntaxError
	if !errors.As(err, &e) {
		t.Fatalf("not a syntax error: %v", err)
	}
	return e
}

func TestShortCannotLeaveItsWrapper(t *testing.T) {
	for _, expr := range []string{
		`true }; permit(principal,action,resource) when { true`,
		`true }; permit(principal,action,resource); //`,
		`true }; permit(principal,action,resource); /*`,
		`true } when { true`,
		`true } unless { false`,
		`true } unless { false }; //`,
		`true }; @id("x") permit(principal,action,resource) when { true`,
		`true };`,
		`true }; //`,
		`true /*`,
		`true /* }; permit(principal,action,resource) when { true`,
		`true }; forbid(principal,action,resource) when { false`,
		`true"`,
		`"a" == "b`,
		`"\`,
		"true\n};\npermit(principal,action,resource)when{\ntrue",
		`true unless { false }`,
		`permit(principal,action,resource) when { true }`,
		`@max_session("1000000h") true`,
		`) && (true`, `} {`, `{`, `(true`, `[true)`, `true;`, `;`, `//`, `/**/`, "true\x00", "\xff",
	} {
		p, err := Short("open", "orders-db", expr)
		if err == nil {
			t.Errorf("%q was accepted: %+v", expr, p.rules)
			continue
		}
		syntaxError(t, err)
	}
	// A comment ends within the wrapper.
	if _, err := Short("open", "orders-db", "true // }; permit(principal,action,resource) when { true"); err != nil {
		t.Error(err)
	}
}

// The brackets would have to lie for any of these to come this far.
func TestOnlyOneBareWhenClauseIsTaken(t *testing.T) {
	for src, want := range map[string]bool{
		`permit(principal,action,resource)when{true};`:                                   true,
		`permit(principal,action,resource)when{true}when{true};`:                         false,
		`permit(principal,action,resource)when{true}unless{true};`:                       false,
		`permit(principal,action,resource)unless{true};`:                                 false,
		`permit(principal,action,resource);`:                                             false,
		`forbid(principal,action,resource)when{true};`:                                   false,
		`@a("b")permit(principal,action,resource)when{true};`:                            false,
		`permit(principal==Node::"P",action,resource)when{true};`:                        false,
		`permit(principal,action==Action::"open",resource)when{true};`:                   false,
		`permit(principal,action,resource is Name)when{true};`:                           false,
		`permit(principal,action,resource)when{true};permit(principal,action,resource);`: false,
		``: false,
	} {
		list, err := cedar.NewPolicyListFromBytes("", []byte(src))
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := onlyWhen(list); ok != want {
			t.Errorf("%s: %v", src, ok)
		}
	}
}

func TestSyntaxErrorsShowPlaceAndRemedy(t *testing.T) {
	for _, c := range []struct {
		expr         string
		line, column int
		remedy       string // in Msg or Hint
	}{
		{`principal.role = "agent"`, 1, 16, "write =="},
		{`principal.role === "agent"`, 1, 18, "write =="},
		{`principal.role == 'agent'`, 1, 19, `write "agent"`},
		{`principal.role == agent`, 1, 19, `"agent"; a shell takes them away`},
		{`[agent, bot].contains(principal.role)`, 1, 2, "a shell takes them away"},
		{`principal.team.contains(db)`, 1, 25, "a shell takes them away"},
		{`principal.role == data-eng`, 1, 19, "a shell takes them away"},
		{`principal.role == \"agent\"`, 1, 19, "no backslash"},
		{`principal.role == “agent”`, 1, 19, "straight double quotes"},
		{`role == "agent"`, 1, 1, "principal.role"},
		{`agent`, 1, 1, "principal.agent"},
		{`true && agent`, 1, 9, "principal.agent"},
		{`subject.role == "agent"`, 1, 1, "principal.role"},
		{`foo.role == "agent"`, 1, 1, "principal, resource, action and context"},
		{`principal.a == "x" and principal.b == "y"`, 1, 20, "write &&"},
		{`principal.a == "x" OR principal.b == "y"`, 1, 20, "write ||"},
		{`not principal.a`, 1, 1, "write !"},
		{`not(principal.a)`, 1, 1, "write !"},
		{`principal.a & true`, 1, 13, "write &&"},
		{`principal.a | true`, 1, 13, "write ||"},
		{`principal.role <> "x"`, 1, 17, "write !="},
		{`principal.ok == True`, 1, 17, "write true"},
		{`principal.role != null`, 1, 19, "principal has role"},
		{`principal.role == "agent`, 1, 19, "closing"},
		{"principal.role == \"agent\n\"", 1, 19, "closing"},
		{`(principal.role == "agent"`, 1, 1, "never closed"},
		{`principal.role == "agent")`, 1, 26, "closes nothing"},
		{`[principal.role)`, 1, 16, "does not close"},
		{``, 1, 1, `principal.role == "agent"`},
		{" \t\n ", 1, 1, `principal.role == "agent"`},
		{"// nothing", 1, 11, `principal.role == "agent"`},
		{`principal.role ==`, 1, 18, "the end"},
		{`principal.`, 1, 11, "the end"},
		{`principal has`, 1, 14, "the end"},
		{`principal.a principal.b`, 1, 13, "&& or ||"},
		{`principal.cost-center == "x"`, 1, 16, `principal["cost-center"]`},
		{`principal.in == "x"`, 1, 11, `["in"]`},
		{`principal.role in ["a", "b"]`, 1, 16, `["a", "b"].contains(`},
		{`principal.role in "a"`, 1, 16, `contains`},
		{`principal == User::"x"`, 1, 14, `Node::"P…"`},
		{`principal == A::B::"x"`, 1, 14, `A::B`},
		{`principal is User`, 1, 14, `Node::"P…"`},
		{`action == Action::"opne"`, 1, 19, "serve, connect, next, open, send, call, watch"},
		{`permit(principal, action, resource);`, 1, 1, "@FILE"},
		{`@id("x") permit(principal, action, resource);`, 1, 1, "@FILE"},
		{`true;`, 1, 5, "@FILE"},
		{`true unless { false }`, 1, 6, "@FILE"},
		{`principal.x == 99999999999999999999`, 1, 16, "64 bits"},
		{`principal.x == "\q"`, 1, 16, "escape"},
		{`principal.x == "\x99"`, 1, 16, "escape"},
		{`true # all`, 1, 6, "//"},
		{`foo(1)`, 1, 1, "not a function"},
		{`principal.x.contain("a")`, 1, 13, "not a method"},
		{`principal.x.contains()`, 1, 13, "one argument"},
		{`if true then false`, 1, 19, "else is expected"},
		{`{a: 1, a: 2}.a == 1`, 1, 11, "duplicate"},
		{"principal.a == 1 &&\n\tprincipal.b == x", 2, 17, "quotes are missing"},
		{"principal.a == \"äöü\" && x == 1", 1, 25, "principal.x"},
		{"principal.a == 1 /* ü\nü */ && x == 1", 2, 9, "principal.x"},
		{"true\u00a0&& true", 1, 5, "no-break"},
	} {
		_, err := Short("open", "orders-db", c.expr)
		if err == nil {
			t.Errorf("%q was accepted", c.expr)
			continue
		}
		e := syntaxError(t, err)
		if e.Line != c.line || e.Column != c.column {
			t.Errorf("%q: at %d:%d, want %d:%d", c.expr, e.Line, e.Column, c.line, c.column)
		}
		if !strings.Contains(e.Msg+"; "+e.Hint, c.remedy) {
			t.Errorf("%q: %s; %s", c.expr, e.Msg, e.Hint)
		}
		if lines := strings.Split(c.expr, "\n"); e.Text != lines[e.Line-1] {
			t.Errorf("%q: shows %q", c.expr, e.Text)
		}
		if s := e.Error(); strings.Contains(s, "when{") || strings.Contains(s, "<input>") {
			t.Errorf("%q shows the wrapper: %s", c.expr, s)
		}
	}
}

func TestFilesAreRefusedWithPlaceAndRemedy(t *testing.T) {
	for _, c := range []struct {
		src          string
		line, column int
		remedy       string
	}{
		{``, 1, 1, "no policy"},
		{"// later\n", 1, 9, "no policy"},
		{`principal.role == "x"`, 1, 1, "permit(principal, action"},
		{`allow(principal, action, resource);`, 1, 1, "permit or forbid"},
		{"permit(principal, action, resource)\n", 1, 36, "; is expected"},
		{`permit(principal, action, resource) where { true };`, 1, 37, "; is expected"},
		{`permit(principal);`, 1, 17, ", is expected"},
		{`permit(principal, action == "open", resource);`, 1, 29, `Action::"open"`},
		{"permit(principal, action, resource)\nwhen { principal.role == agent };", 2, 26, "quotes are missing"},
		{"permit(principal, action, resource)\nwhen { principal.role = 'agent' };", 2, 23, "write =="},
		{"\n@max_session(\"8x\") permit(principal, action, resource);", 2, 14, "not a length of time"},
		{`@max_session("-1h") permit(principal, action, resource);`, 1, 14, "not a length of time"},
		{`@max_session("500ms") permit(principal, action, resource);`, 1, 14, "not a length of time"},
		{`@max_session permit(principal, action, resource);`, 1, 2, "not a length of time"},
		{`@max_sesion("8h") permit(principal, action, resource);`, 1, 2, `@max_session("8h")`},
		{`@Max_Session("8h") permit(principal, action, resource);`, 1, 2, `@max_session("8h")`},
		{`@id("x") @max_session("8h") forbid(principal, action, resource);`, 1, 11, "put it on a permit"},
		{`@id("") permit(principal, action, resource);`, 1, 5, "printable"},
		{`@id("a\nb") permit(principal, action, resource);`, 1, 5, "printable"},
		{`permit(principal in Group::"x", action, resource);`, 1, 21, "no entity type"},
		{`permit(principal, action, resource is Database);`, 1, 39, "no entity type"},
		{`forbid(principal, action in [Action::"open", Action::"opne"], resource);`, 1, 54, "the actions are"},
		{"\ufeffpermit(principal, action, resource);", 1, 1, "byte order mark"},
		{"permit(principal, action, resource);\xff", 1, 37, "UTF-8"},
		{"permit(principal, action, resource);\r\npermit(principal, action, resource) /*\r\n", 2, 37, "comment"},
	} {
		_, err := Parse("dir/p.cedar", []byte(c.src))
		if err == nil {
			t.Errorf("%q was accepted", c.src)
			continue
		}
		e := syntaxError(t, err)
		if e.Line != c.line || e.Column != c.column || !strings.Contains(e.Msg+"; "+e.Hint, c.remedy) {
			t.Errorf("%q: %v", c.src, e)
		}
		if want := fmt.Sprintf("dir/p.cedar:%d:%d: ", c.line, c.column); !strings.HasPrefix(e.Error(), want) {
			t.Errorf("%q: %v", c.src, e)
		}
	}
}

func TestCaretStandsBelowThePlace(t *testing.T) {
	for _, c := range []struct{ expr, want string }{
		{`principal.role = "agent"`, "" +
			"policy:1:16: = is not an operator\n" +
			"  principal.role = \"agent\"\n" +
			"                 ^\n" +
			"  write == to compare"},
		{"\ttrue &&\tx == 1", "" +
			"policy:1:10: there is no variable x\n" +
			"  \ttrue &&\tx == 1\n" +
			"  \t       \t^\n" +
			"  an attribute of the peer is principal.x; the variables are principal, resource, action and context"},
		{`"äö" == 'x`, "" +
			"policy:1:9: texts stand in double quotes\n" +
			"  \"äö\" == 'x\n" +
			"          ^\n" +
			"  write double quotes; in a shell, put the whole policy into single quotes: 'principal.role == \"agent\"'"},
		{"\"\x1b[31m\" == 'x'", "" +
			"policy:1:12: texts stand in double quotes\n" +
			"  \"\uFFFD[31m\" == 'x'\n" +
			"             ^\n" +
			"  write \"x\"; in a shell, put the whole policy into single quotes: 'principal.role == \"agent\"'"},
	} {
		if _, err := Short("open", "x", c.expr); err == nil || err.Error() != c.want {
			t.Errorf("%q:\n%v\nwant:\n%s", c.expr, err, c.want)
		}
	}

	_, err := Short("open", "x", strings.Repeat("true && ", 200)+"x == 1"+strings.Repeat(" && true", 200))
	lines := strings.Split(err.Error(), "\n")
	if at := utf8.RuneCountInString(lines[2]) - 1; len(lines[1]) > 200 || []rune(lines[1])[at] != 'x' {
		t.Errorf("%v", err)
	}
}

func TestTextsBeyondTheLimitsAreRefusedBeforeParsing(t *testing.T) {
	rep := strings.Repeat
	for name, expr := range map[string]string{
		"long":            rep(" ", maxShort) + "true",
		"parentheses":     rep("(", maxDepth+1) + "true" + rep(")", maxDepth+1),
		"brackets":        rep("[", maxDepth+1) + rep("]", maxDepth+1) + " == []",
		"braces":          rep("{a:", maxDepth+1) + "1" + rep("}", maxDepth+1) + ".a == 1",
		"ifs":             rep("if true then true else ", maxDepth+1) + "true",
		"conditions":      rep("if ", maxDepth+1) + "true" + rep(" then true else true", maxDepth+1),
		"negations":       rep("!", maxOperators+1) + "true",
		"conjunctions":    "true" + rep("&&true", maxOperators+1),
		"accesses":        "principal" + rep(".a", maxOperators+1),
		"parts":           "principal in Node" + rep("::a", maxParts) + `::"P"`,
		"wildcards":       `principal.a like "` + rep("*", maxOperators+1) + `"`,
		"signs":           rep(",", maxShortTokens+1),
		"open only":       rep("(", maxShort),
		"doubling":        rep("(", 31) + "principal" + rep(" has a.b)", 31),
		"doubling in has": rep("(", 20) + "principal" + rep(".a has a.b.c.d)", 20),
		"long chain":      "principal has a" + rep(".a", 600),
	} {
		_, err := Short("open", "orders-db", expr)
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		if e := syntaxError(t, err); len(e.Error()) > 600 {
			t.Errorf("%s: %d bytes of error", name, len(e.Error()))
		}
	}
	for name, expr := range map[string]string{
		"deep":      rep("(", maxDepth) + "true" + rep(")", maxDepth),
		"wide":      rep("(true) && ", 200) + "(" + rep("if true then false else ", 10) + "true)",
		"a set":     `["` + rep(`a", "`, 500) + `"].contains(principal.role)`,
		"dotted":    "principal has a.b.c && " + rep("context has a.b && ", 50) + "true",
		"nested if": rep("if true then true else ", maxDepth) + "true",
	} {
		if _, err := Short("open", "orders-db", expr); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Parse("p", []byte(rep("permit(principal, action, resource) when { principal.a && !principal.b };\n", 100))); err != nil {
		t.Error(err)
	}
	// What one policy may grow to, some hundred in one file may not.
	doubling := "permit(principal, action, resource) when { " + rep("(", 6) + "principal" + rep(" has a.b)", 6) + " };\n"
	if _, err := Parse("p", []byte(doubling)); err != nil {
		t.Error(err)
	}
	if _, err := Parse("p", []byte(rep(doubling, maxSource/len(doubling)))); err == nil {
		t.Error("policies that all grow were accepted")
	}
	if _, err := Parse("p", []byte(rep(",", maxSource))); err == nil || !strings.Contains(err.Error(), "words and signs") {
		t.Errorf("a source of commas: %v", err)
	}
	if _, err := Parse("p", []byte(rep(" ", maxSource+1))); err == nil {
		t.Error("a source beyond 64 KiB was accepted")
	}
}

var seeds = []string{
	`principal.role == "agent"`, `true }; permit(principal,action,resource) when { true`, `principal has a.b && context.c["d"].contains(1)`,
	`if principal.x > -9223372036854775808 then !true else "a" like "b\*c*"`, `principal in [Node::"P", resource] || action in Action::"open"`,
	`ip("10.0.0.1").isInRange(ip("10.0.0.0/8"))`, `principal.role == 'x' and y`, "\"\\u{1F600}\" == \"\\x41\" // ü", `{a: [1,2,{"b c": 3}]} == {}`, `/* */`, `principal.a-b = c`,
}

// checkRead holds for whatever was read: it decides without a panic and the same way
// twice, and an error shows a place within the text.
func checkRead(t *testing.T, p *Policy, err error, src string) {
	if err != nil {
		e := syntaxError(t, err)
		if e.Line < 1 || e.Line > 1+strings.Count(src, "\n") || e.Column < 1 || e.Column > 1+utf8.RuneCountInString(e.Text)+1 || e.Msg == "" {
			t.Fatalf("%q: %+v", src, e)
		}
		if s := e.Error(); !utf8.ValidString(s) || strings.ContainsAny(s, "\x00\x1b\x07") || strings.Contains(s, "<input>") {
			t.Fatalf("%q: %q", src, s)
		}
		return
	}
	r := ask(map[string]any{"role": "agent", "a": map[string]any{"b": int64(1)}, "x": int64(-1)})
	if a, b := p.Decide(r), p.Decide(r); fmt.Sprint(a) != fmt.Sprint(b) {
		t.Fatalf("%q: %+v, then %+v", src, a, b)
	}
}

func FuzzShort(f *testing.F) {
	for _, s := range seeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, expr string) {
		defer alloc.Bound(t, len(expr))()
		p, err := Short("open", "orders-db", expr)
		checkRead(t, p, err, expr)
		if err != nil {
			return
		}
		for _, r := range []Request{
			{PrincipalID: "P", Action: "serve", ResourceID: "orders-db"},
			{PrincipalID: "P", Action: "open", ResourceID: "other"},
		} {
			if p.Decide(r).Allow {
				t.Fatalf("%q permits %+v", expr, r)
			}
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, s := range seeds {
		f.Add([]byte(s))
		f.Add([]byte(`@id("a") @max_session("8h") permit(principal == Node::"P", action in [Action::"open"], resource is Name) when { ` + s + ` } unless { false };`))
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		defer alloc.Bound(t, len(src))()
		p, err := Parse("p.cedar", src)
		checkRead(t, p, err, string(src))
	})
}

func FuzzDecide(f *testing.F) {
	f.Add(`principal.role == "agent"`, "role", "agent", int64(1), true)
	f.Add(`principal.n + 1 > 0 || principal.b`, "n", "x", int64(9223372036854775807), false)
	f.Add(`decimal(principal.s).lessThan(decimal("1.0"))`, "s", "1.00000", int64(0), false)
	f.Fuzz(func(t *testing.T, expr, name, s string, n int64, b bool) {
		defer alloc.Bound(t, len(expr)+len(name)+len(s))()
		p, err := Short("open", "orders-db", expr)
		if err != nil {
			return
		}
		r := ask(map[string]any{name: s, "n": n, "b": b, "l": []string{s, name}, "m": map[string]any{name: n}})
		d := p.Decide(r)
		if d.Allow == (len(d.Policies) == 0) || d.Allow && len(d.Errors) > 0 {
			t.Fatalf("%q: %+v", expr, d)
		}
		forbid := Join(p, mustParse(t, "forbid(principal, action, resource) when { "+expr+"\n};"))
		if d := forbid.Decide(r); d.Allow {
			t.Fatalf("%q both permits and does not forbid: %+v", expr, d)
		}
	})
}

func TestALyingPolicyAllocatesLittle(t *testing.T) {
	short := [][]byte{[]byte(strings.Repeat("(", 8) + "principal" + strings.Repeat(" has a.b)", 8))}
	for _, s := range seeds {
		short = append(short, []byte(s))
	}
	alloc.Hostile(t, func(b []byte) { Short("open", "orders-db", string(b)) }, short...)

	// The costliest that a file may hold of each kind, whether it is accepted in the end or not. A # is a
	// number, another each time.
	rep := strings.Repeat
	one := `permit(principal, action == Action::"open", resource == Name::"db") when { `
	for name, of := range map[string]struct{ before, unit, after string }{
		"signs":       {"", ",", ""},
		"unknown":     {"", "\x01", ""},
		"smallest":    {"", "permit(principal,action,resource);", ""},
		"rules":       {"", one + `principal.role == "agent" };` + "\n", ""},
		"annotations": {"", `@id("a")@b("c")permit(principal,action,resource);`, ""},
		"has":         {"", one + `principal has role && principal has team && principal.team like "a*b" };`, ""},
		"doubling":    {"", one + rep("(", 6) + "principal" + rep(" has a.b)", 6) + " };", ""},
		"a chain":     {one + "true", "&&true", "};"},
		"chains":      {"", one + "true" + rep("&&true", 400) + "};", ""},
		"comparisons": {"", one + "1<2" + rep("&&1<2", 200) + "};", ""},
		"a set":       {one + `["a"`, `,"a"`, `].contains(principal.role)};`},
		"sets":        {"", one + `[[[1],[2]],[[3],[4]]].contains(principal.role)};`, ""},
		"records":     {"", one + `{a:{b:1},c:{d:2}} == {a:principal,b:context}};`, ""},
		"long texts":  {"", one + `{a:{b:"` + rep(`\u{1F600}`, 150) + `"},c:{d:2}} == {a:principal,b:context}};`, ""},
		"members":     {one + "principal in [", `Node::"P` + rep("A", 52) + `",`, `principal]};`},
		"ifs":         {"", one + rep("if true then true else ", 20) + "true};", ""},
		"calls":       {"", one + `ip("10.0.0.1").isInRange(ip("10.0.0.0/8")) && decimal("1.0").lessThan(decimal("2.0"))};`, ""},
		"a pattern":   {one + `principal.a like "`, "*a", `"};`},
		"patterns":    {"", one + `principal.a like "` + rep("*a", 400) + `"};`, ""},
		"texts":       {"", one + `principal.a == "` + rep(`\u{1F600}`, 60) + `"};`, ""},
		"parts":       {one, `principal in Node` + rep("::"+rep("a", 60), maxParts-1) + `::"a" && `, "true};"},
		"shortest":    {"", `permit(principal,action,resource)when{principal has a};`, ""},
		"two clauses": {"", `permit(principal,action,resource)when{1==1}unless{1==2};`, ""},
		"bare":        {"@a", "@a#", "permit(principal,action,resource);"},
		"a record":    {one + "{a:1", ",a#:1", "}.a==1};"},
		"actions":     {"", `permit(principal,action in [Action::"open",Action::"open"],resource);`, ""},
	} {
		times := func(n int) string {
			var b strings.Builder
			b.WriteString(of.before)
			for i := range n {
				b.WriteString(strings.ReplaceAll(of.unit, "#", fmt.Sprint(i)))
			}
			return b.String() + of.after
		}
		n := sort.Search(maxSource/len(of.unit), func(n int) bool {
			_, err := scan("p", times(n+1), maxSource, maxSourceTokens)
			return err != nil
		})
		if n == 0 {
			t.Errorf("%s: not even one is read", name)
		}
		for _, n := range []int{n, n + 1, min(10*n, maxSource/len(of.unit))} {
			src := []byte(times(n))
			var err error
			spent := alloc.Spent(func() { _, err = Parse("p.cedar", src) })
			t.Logf("%s, %d times, %d bytes: %d bytes, %v", name, n, len(src), spent, err == nil)
			if spent > alloc.Limit {
				t.Errorf("%s: %d bytes were allocated for %d", name, spent, len(src))
			}
		}
	}
}
