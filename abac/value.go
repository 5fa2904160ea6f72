package abac

import (
	"fmt"

	"github.com/cedar-policy/cedar-go"
)

// maxValueDepth bounds nested maps; it also ends a map that contains itself.
const maxValueDepth = 32

// entities are the two that a request is about. Neither has parents: `in` is
// equality here.
type entities struct {
	principal, resource cedar.Entity
	request             cedar.Request
}

func (e *entities) Get(uid cedar.EntityUID) (cedar.Entity, bool) {
	switch uid {
	case e.principal.UID:
		return e.principal, true
	case e.resource.UID:
		return e.resource, true
	}
	return cedar.Entity{}, false
}

// convert gives a request Cedar's types. Every value is checked, but only what the
// policies can read is converted: an attribute of an entity is reached by its
// name alone, so those whose names stand in no policy are left out. Errors name
// attributes, not values.
func (p *Policy) convert(r *Request) (*entities, error) {
	if err := checkValues("principal", r.Principal, 1); err != nil {
		return nil, err
	}
	if err := checkValues("resource", r.Resource, 1); err != nil {
		return nil, err
	}
	if err := checkValues("context", r.Context, 1); err != nil {
		return nil, err
	}
	e := &entities{
		principal: cedar.Entity{UID: cedar.NewEntityUID(typeNode, cedar.String(r.PrincipalID)), Attributes: p.attributes(r.Principal)},
		resource:  cedar.Entity{UID: cedar.NewEntityUID(typeName, cedar.String(r.ResourceID)), Attributes: p.attributes(r.Resource)},
	}
	e.request = cedar.Request{
		Principal: e.principal.UID,
		Action:    cedar.NewEntityUID(typeAction, cedar.String(r.Action)),
		Resource:  e.resource.UID,
	}
	if p.context { // a record, which policies may compare as a whole
		e.request.Context = record(r.Context)
	}
	return e, nil
}

func checkValues(of string, m map[string]any, depth int) error {
	if depth > maxValueDepth {
		return fmt.Errorf("%s is nested more than %d deep", of, maxValueDepth)
	}
	for name, v := range m {
		switch v := v.(type) {
		case string, int64, bool, []string:
		case map[string]any:
			if err := checkValues(of, v, depth+1); err != nil {
				return err
			}
		default:
			return fmt.Errorf("attribute %q of %s is a %T", name, of, v)
		}
	}
	return nil
}

func (p *Policy) attributes(m map[string]any) cedar.Record {
	var values cedar.RecordMap
	for _, name := range p.reads {
		if v, ok := m[name]; ok {
			if values == nil {
				values = make(cedar.RecordMap, len(p.reads))
			}
			values[cedar.String(name)] = value(v)
		}
	}
	return cedar.NewRecord(values)
}

func record(m map[string]any) cedar.Record {
	values := make(cedar.RecordMap, len(m))
	for name, v := range m {
		values[cedar.String(name)] = value(v)
	}
	return cedar.NewRecord(values)
}

// value converts what checkValues has let through.
func value(v any) cedar.Value {
	switch v := v.(type) {
	case string:
		return cedar.String(v)
	case int64:
		return cedar.Long(v)
	case bool:
		return cedar.Boolean(v)
	case []string:
		list := make([]cedar.Value, len(v))
		for i, s := range v {
			list[i] = cedar.String(s)
		}
		return cedar.NewSet(list...)
	default:
		return record(v.(map[string]any))
	}
}
