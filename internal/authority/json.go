package authority

import (
	"bytes"
	"encoding/json"
	"fmt"

	"github.com/portal-tunnel/portal/identity"
)

// UnmarshalJSON reads what MarshalJSON wrote, attributes of type int64 and []string included.
func (i *TicketInfo) UnmarshalJSON(b []byte) error {
	type plain TicketInfo
	return decodeInfo(b, (*plain)(i), &i.Attributes)
}

// UnmarshalJSON reads what MarshalJSON wrote, attributes of type int64 and []string included.
func (i *MemberInfo) UnmarshalJSON(b []byte) error {
	type plain MemberInfo
	return decodeInfo(b, (*plain)(i), &i.Attributes)
}

// decodeInfo decodes b into v and gives attrs, which are part of it, their types.
func decodeInfo(b []byte, v any, attrs *identity.Attributes) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(v); err != nil {
		return err
	}
	for name, v := range *attrs {
		n, ok := v.(json.Number)
		if !ok {
			continue
		}
		i, err := n.Int64()
		if err != nil {
			return fmt.Errorf("the attribute %q is not an integer of 64 bits", name)
		}
		(*attrs)[name] = i
	}
	return settle(*attrs)
}

// settle turns the lists that a decoder made into lists of text.
func settle(attrs identity.Attributes) error {
	for name, v := range attrs {
		list, ok := v.([]any)
		if !ok {
			continue
		}
		texts := make([]string, len(list))
		for i, e := range list {
			if texts[i], ok = e.(string); !ok {
				return fmt.Errorf("the attribute %q is a list of something else than text", name)
			}
		}
		attrs[name] = texts
	}
	return nil
}
