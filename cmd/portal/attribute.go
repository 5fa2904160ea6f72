package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"

	"github.com/portal-tunnel/portal/identity"
)

// attributes reads k=v, a string, and k:=JSON: a string, integer, boolean or
// list of strings.
func attributes(flag string, words []string) (map[string]any, error) {
	out := make(map[string]any)
	for _, word := range words {
		name, v, err := attribute(word)
		if err == nil {
			err = identity.ValidAttribute(name)
		}
		if _, twice := out[name]; err == nil && twice {
			err = fmt.Errorf("%s is given twice; a list is %s:=[\"a\",\"b\"]", name, name)
		}
		if err != nil {
			remedy := causes[codeAttribute][1]
			if identity.Reserved(name) {
				remedy = "--name, --serve and --as-relay of `portal ticket create` set what they may; the rest is observed"
			}
			return nil, fail(codeAttribute, remedy, "--%s %q: %w", flag, plain(word), err)
		}
		out[name] = v
	}
	return out, nil
}

func attribute(word string) (name string, v any, err error) {
	name, text, ok := strings.Cut(word, "=")
	if !ok {
		return name, nil, fmt.Errorf("there is no =")
	}
	name, typed := strings.CutSuffix(name, ":")
	if !typed {
		return name, text, nil
	}
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		return name, nil, fmt.Errorf("the value is no JSON; text needs no quotes in %s=text", name)
	}
	if _, err := d.Token(); err != io.EOF {
		return name, nil, fmt.Errorf("something follows the JSON value")
	}
	v, err = attributeValue(v)
	return name, v, err
}

func attributeValue(v any) (any, error) {
	switch v := v.(type) {
	case string, bool:
		return v, nil
	case json.Number:
		n, ok := new(big.Int).SetString(v.String(), 10)
		if !ok || !n.IsInt64() {
			return nil, fmt.Errorf("%s is no 64-bit integer", v)
		}
		return n.Int64(), nil
	case []any:
		list := make([]string, 0, len(v))
		for _, e := range v {
			text, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("a list holds strings only")
			}
			list = append(list, text)
		}
		return list, nil
	}
	return nil, fmt.Errorf("a value is a string, an integer, a boolean or a list of strings")
}

// attributeText is name=value as people read it, sorted by name; show makes a
// value fit to print.
func attributeText(attrs map[string]any, show func(string) string) string {
	var words []string
	for name, v := range attrs {
		words = append(words, name+"="+show(valueText(v)))
	}
	slices.Sort(words)
	return strings.Join(words, " ")
}

func valueText(v any) string {
	if text, ok := v.(string); ok {
		return text
	}
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Sprint(v)
	}
	return string(b)
}
