// Package abac decides whether a peer may do what it asks, from Cedar policies
// over the attributes of the peer, of what it asks for, and of what this node
// observed (https://docs.cedarpolicy.com). It wraps cedar-go and departs from
// Cedar in four ways, each of them stricter:
//
//   - a forbid that cannot be evaluated refuses; Cedar skips it, so that a
//     missing attribute would switch a prohibition off;
//   - a value of a type that policies do not know refuses the whole request;
//   - what can only be a mistake is a [SyntaxError] where the policy is
//     read and not a rule that silently never applies: an unknown entity type or
//     action, `in` with strings, a misspelt @max_session;
//   - source size, nesting and the number of operators are limited before
//     cedar-go sees the text.
//
// Everything else is Cedar: nothing is permitted unless a permit says so, a
// forbid overrides every permit, a permit that cannot be evaluated does not
// count, and evaluation always ends.
//
// In whole policies a peer is Node::"P…" with its attributes, an action is
// Action::"open", and what is asked for is Name::"orders-db" with its labels.
package abac

import (
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	cedarast "github.com/cedar-policy/cedar-go/ast"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
)

// The entity types of a request. A policy that names another type can never
// match and is refused when it is read.
const (
	typeNode   = "Node"
	typeAction = "Action"
	typeName   = "Name"
)

// actions are all that a node asks policies about.
var actions = []string{"serve", "connect", "next", "open", "send", "call", "watch"}

// Request is one question. Values are string, int64, bool, []string, or a
// map[string]any of these, nested at most 32 deep; any other type refuses.
// The maps are read only during Decide and never changed.
type Request struct {
	Principal   map[string]any // the peer: what its credential says, id, name, authority, serve
	PrincipalID string         // its identifier: Node::"P…"
	Action      string         // one of serve, connect, next, open, send, call, watch
	Resource    map[string]any // labels of the outlet, name or actor
	ResourceID  string         // its name: Name::"orders-db"
	Context     map[string]any // what the deciding node saw itself; a peer's claims only under "claimed"
}

// Decision is the answer and its reason. It holds names and never values of
// attributes, so it may be logged, and Policies and Missing may be told to a
// peer of the same authority.
type Decision struct {
	Allow bool
	// Policies are the ids of those that decided, in the order they were given:
	// the permits that permit, or the forbids that forbid or could not be
	// evaluated. Empty when nothing permits. An id is the policy's @id, or
	// allow[i] for the i-th short form, or FILE:policyN, counted from 0.
	Policies []string
	// Missing are the attributes that the principal lacks and that a policy
	// asked for, sorted: of the permits for this action and resource when
	// none permits, of the forbids that could not be evaluated otherwise.
	Missing []string
	// MaxSession is the least @max_session of the permits that permit; zero
	// when none of them has one. The least, because a second permit that happens
	// to match as well must not lengthen what the first one limits.
	MaxSession time.Duration
	// Errors say which policies could not be evaluated and why.
	Errors []string
}

// Reason is the decision in one sentence, for a log.
func (d Decision) Reason() string {
	var b strings.Builder
	switch {
	case d.Allow:
		b.WriteString(phrase(d.Policies, "permits", "permit"))
		return b.String()
	case len(d.Policies) > 0:
		b.WriteString(phrase(d.Policies, "forbids it", "forbid it"))
	default:
		b.WriteString("no policy permits it")
	}
	if len(d.Missing) > 0 {
		b.WriteString("; principal does not have the attribute")
		for i, name := range d.Missing {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteByte(' ')
			b.WriteString(strconv.Quote(name))
		}
	} else if len(d.Errors) > 0 {
		b.WriteString("; ")
		b.WriteString(d.Errors[0])
	}
	return b.String()
}

func phrase(ids []string, one, many string) string {
	if len(ids) == 1 {
		return "policy " + ids[0] + " " + one
	}
	return "policies " + strings.Join(ids, ", ") + " " + many
}

// Policy is a set of policies, read and compiled once. It is immutable and safe
// for concurrent use. A nil Policy denies.
type Policy struct {
	rules []rule
	// scopes are the heads of the permits, without their conditions: they tell
	// which permits were about this request when none permitted it.
	scopes []rule
	// reads are the names of all attributes that conditions read, of whatever;
	// context says that one reads the context. Nothing else need be converted.
	reads   []string
	context bool
}

// rule is one permit or forbid.
type rule struct {
	key     cedar.PolicyID // its index in the set, in decimal
	id      string         // as people see it
	short   bool           // from Short: Join may number it
	cedar   *cedar.Policy
	asks    []string // attributes of principal its conditions read, sorted
	session time.Duration
}

// inOrder gives cedar-go the rules in their order; its own PolicySet is a map,
// and would name the policies of a decision in another order each time.
type inOrder []rule

func (rs inOrder) All() iter.Seq2[cedar.PolicyID, *cedar.Policy] {
	return func(yield func(cedar.PolicyID, *cedar.Policy) bool) {
		for i := range rs {
			if !yield(rs[i].key, rs[i].cedar) {
				return
			}
		}
	}
}

// Parse reads whole policies, as a file holds them; name is that file's, for
// errors and ids. Errors are of type [*SyntaxError]. At most 64 KiB and 2,000 words and signs; a text
// without a policy is an error, since it is more often half a file than a wish
// to deny all.
//
// Annotations: @id("…") names a policy in decisions, @max_session("8h") on a
// permit (a Go duration, at least one second) limits what it permits.
func Parse(name string, src []byte) (*Policy, error) {
	t, err := scan(name, string(src), maxSource, maxSourceTokens)
	if err != nil {
		return nil, err
	}
	list, cerr := cedar.NewPolicyListFromBytes(name, src)
	if cerr != nil {
		return nil, t.explain(cerr, false)
	}
	if len(list) == 0 {
		return nil, t.fail(t.eof(), "there is no policy in it", "write for example: "+wholeExample)
	}
	if err := t.check(); err != nil {
		return nil, err
	}
	rules := make([]rule, len(list))
	for i, p := range list {
		r := rule{id: fmt.Sprintf("%s:policy%d", name, i), cedar: p}
		if err := t.annotate(&r, p); err != nil {
			return nil, err
		}
		rules[i] = r
	}
	return compile(rules), nil
}

// Short reads one expression, as --allow takes it, and permits by it exactly
// one action on one resource:
//
//	permit(principal, action == Action::"open", resource == Name::"orders-db") when { EXPR };
//
// At most 8 KiB. The text cannot leave the braces: its brackets must balance
// within it, what is parsed must be one bare permit with one `when`, and only
// that clause's expression is taken, into a policy whose action and resource never
// were text. Errors are of type [*SyntaxError] and show the user's own text; their
// Name is empty, for the caller to set to the flag.
func Short(action, resource, expr string) (*Policy, error) {
	return short(action, expr, func(p *ast.Policy) *ast.Policy {
		return p.ResourceEq(cedar.NewEntityUID(typeName, cedar.String(resource)))
	})
}

// ShortAny is Short for every resource, as --allow-serve and --allow-connect take
// it.
func ShortAny(action, expr string) (*Policy, error) {
	return short(action, expr, func(p *ast.Policy) *ast.Policy { return p })
}

// short scopes the expression to the action, and by scope to a resource.
func short(action, expr string, scope func(*ast.Policy) *ast.Policy) (*Policy, error) {
	if !slices.Contains(actions, action) {
		return nil, fmt.Errorf("making a policy: unknown action %q", action)
	}
	t, err := scan("", expr, maxShort, maxShortTokens)
	if err != nil {
		return nil, err
	}
	if err := t.checkShort(); err != nil {
		return nil, err
	}
	// The line feeds end a comment at the end of the text, and keep the columns.
	list, cerr := cedar.NewPolicyListFromBytes("", []byte("permit(principal,action,resource)when{\n"+expr+"\n};"))
	if cerr != nil {
		return nil, t.explain(cerr, true)
	}
	condition, ok := onlyWhen(list)
	if !ok {
		return nil, t.fail(t.list[0], "this is more than one expression", "whole policies go into a file: @FILE")
	}
	if err := t.check(); err != nil {
		return nil, err
	}
	p := scope(ast.Permit().ActionEq(cedar.NewEntityUID(typeAction, cedar.String(action)))).When(ast.NewNode(condition))
	c := cedar.NewPolicyFromAST((*cedarast.Policy)(p))
	return compile([]rule{{id: "allow[0]", short: true, cedar: c}}), nil
}

// onlyWhen returns the body of the one `when` clause of the one bare permit
// that the list must be.
func onlyWhen(list cedar.PolicyList) (ast.IsNode, bool) {
	if len(list) != 1 {
		return nil, false
	}
	p := list[0].AST()
	_, anyPrincipal := p.Principal.(ast.ScopeTypeAll)
	_, anyAction := p.Action.(ast.ScopeTypeAll)
	_, anyResource := p.Resource.(ast.ScopeTypeAll)
	if p.Effect != ast.EffectPermit || len(p.Annotations) != 0 || !anyPrincipal || !anyAction || !anyResource ||
		len(p.Conditions) != 1 || p.Conditions[0].Condition != ast.ConditionWhen {
		return nil, false
	}
	return p.Conditions[0].Body, true
}

// Join makes one set of several: any permit permits, no forbid may forbid. The
// i-th argument, when it is a single short form, is named allow[i]. A nil among
// them adds nothing; Join of nothing denies.
func Join(ps ...*Policy) *Policy {
	var rules []rule
	for i, p := range ps {
		if p == nil {
			continue
		}
		if len(p.rules) == 1 && p.rules[0].short {
			r := p.rules[0]
			r.id = fmt.Sprintf("allow[%d]", i)
			rules = append(rules, r)
			continue
		}
		rules = append(rules, p.rules...)
	}
	return compile(rules)
}

// compile owns rules.
func compile(rules []rule) *Policy {
	p := &Policy{rules: rules}
	for i := range rules {
		r := &rules[i]
		r.key = cedar.PolicyID(strconv.Itoa(i))
		p.inspect(r)
		if r.cedar.Effect() != cedar.Permit || len(r.asks) == 0 {
			continue
		}
		head := *r.cedar.AST()
		head.Conditions, head.Annotations = nil, nil
		p.scopes = append(p.scopes, rule{key: r.key, cedar: cedar.NewPolicyFromAST(&head)})
	}
	slices.Sort(p.reads)
	p.reads = slices.Compact(p.reads)
	return p
}

// inspect notes what the conditions of r read.
func (p *Policy) inspect(r *rule) {
	r.asks = nil
	reads := func(of ast.IsNode, name cedar.String) {
		p.reads = append(p.reads, string(name))
		if v, ok := of.(ast.NodeTypeVariable); ok && v.Name == "principal" {
			r.asks = append(r.asks, string(name))
		}
	}
	for _, c := range r.cedar.AST().Conditions {
		ast.Inspect(ast.NewNode(c.Body), func(n ast.IsNode) bool {
			switch n := n.(type) {
			case ast.NodeTypeAccess:
				reads(n.Arg, n.Value)
			case ast.NodeTypeHas:
				reads(n.Arg, n.Value)
			case ast.NodeTypeVariable:
				p.context = p.context || n.Name == "context"
			}
			return true
		})
	}
	slices.Sort(r.asks)
	r.asks = slices.Compact(r.asks)
}

// Decide answers one request. It never panics and takes a few microseconds.
func (p *Policy) Decide(r Request) Decision {
	if p == nil || len(p.rules) == 0 {
		return Decision{}
	}
	e, err := p.convert(&r)
	if err != nil {
		return Decision{Errors: []string{"the request cannot be read: " + err.Error()}}
	}
	verdict, why := cedar.Authorize(inOrder(p.rules), e, e.request)

	var d Decision
	unable := make([]*rule, 0, 4)
	for _, f := range why.Errors {
		rule := p.rule(f.PolicyID)
		d.Errors = append(d.Errors, "policy "+rule.id+" cannot be evaluated: "+cause(f.Message))
		if rule.cedar.Effect() == cedar.Forbid {
			unable = append(unable, rule)
		}
	}
	if len(unable) > 0 || verdict == cedar.Deny {
		return p.deny(&r, e, d, why.Reasons, unable)
	}

	d.Allow = true
	d.Policies = make([]string, len(why.Reasons))
	for i, reason := range why.Reasons {
		rule := p.rule(reason.PolicyID)
		d.Policies[i] = rule.id
		if rule.session > 0 && (d.MaxSession == 0 || rule.session < d.MaxSession) {
			d.MaxSession = rule.session
		}
	}
	return d
}

// deny names the forbids that forbade or could not be evaluated, or else what
// was missing for a permit.
func (p *Policy) deny(r *Request, e *entities, d Decision, reasons []cedar.DiagnosticReason, unable []*rule) Decision {
	decided := slices.Clone(unable)
	for _, reason := range reasons { // permits, if only the unable ones forbid
		if rule := p.rule(reason.PolicyID); rule.cedar.Effect() == cedar.Forbid {
			decided = append(decided, rule)
		}
	}
	if len(decided) == 0 {
		_, about := cedar.Authorize(inOrder(p.scopes), e, e.request)
		for _, reason := range about.Reasons {
			d.Missing = lacking(d.Missing, p.rule(reason.PolicyID), r)
		}
	}
	for i := range p.rules {
		if slices.Contains(decided, &p.rules[i]) {
			d.Policies = append(d.Policies, p.rules[i].id)
		}
	}
	for _, rule := range unable {
		d.Missing = lacking(d.Missing, rule, r)
	}
	slices.Sort(d.Missing)
	d.Missing = slices.Compact(d.Missing)
	return d
}

func lacking(names []string, rule *rule, r *Request) []string {
	for _, name := range rule.asks {
		if _, ok := r.Principal[name]; !ok {
			names = append(names, name)
		}
	}
	return names
}

func (p *Policy) rule(key cedar.PolicyID) *rule {
	i, _ := strconv.Atoi(string(key))
	return &p.rules[i]
}

// cause puts an evaluation error of cedar-go's into words without a value of an
// attribute in them; some of its own quote them.
func cause(msg string) string {
	const attribute = "does not have the attribute "
	if i := strings.LastIndex(msg, attribute); i >= 0 {
		return attribute + strconv.Quote(strings.Trim(msg[i+len(attribute):], "`"))
	}
	switch {
	case strings.HasPrefix(msg, "type error: expected "): // names types only
		return msg
	case strings.HasPrefix(msg, "type error"):
		return "type error"
	case strings.Contains(msg, "does not have the tag"):
		return "entities have no tags"
	case strings.Contains(msg, "does not exist"):
		return "it reads an attribute of an entity that is not part of the request"
	case strings.Contains(msg, "overflow"):
		return "integer overflow"
	case strings.Contains(msg, "wrong number of arguments"):
		return "wrong number of arguments"
	}
	return "a text is not of the form that the function needs"
}
