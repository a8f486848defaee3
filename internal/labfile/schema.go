// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
)

// schema is the part of JSON schema (draft 2020-12) that Labfiles need.
type schema struct {
	Schema        string     `json:"$schema,omitempty"`
	Title         string     `json:"title,omitempty"`
	Description   string     `json:"description,omitempty"`
	Type          any        `json:"type,omitempty"` // a string or several
	Const         string     `json:"const,omitempty"`
	Enum          []string   `json:"enum,omitempty"`
	Pattern       string     `json:"pattern,omitempty"`
	MinLength     int        `json:"minLength,omitempty"`
	Minimum       *int       `json:"minimum,omitempty"`
	Maximum       *int       `json:"maximum,omitempty"`
	Items         *schema    `json:"items,omitempty"`
	MaxItems      int        `json:"maxItems,omitempty"`
	Properties    properties `json:"properties,omitempty"`
	Patterns      properties `json:"patternProperties,omitempty"`
	PropertyNames *schema    `json:"propertyNames,omitempty"`
	Additional    any        `json:"additionalProperties,omitempty"` // a *schema or false
	MinProperties int        `json:"minProperties,omitempty"`
	Required      []string   `json:"required,omitempty"`
	AnyOf         []*schema  `json:"anyOf,omitempty"`
	OneOf         []*schema  `json:"oneOf,omitempty"`
}

// properties keeps the order of the keys, which editors offer them in.
type properties []property

type property struct {
	name   string
	schema *schema
}

// MarshalJSON renders the properties as an object.
func (p properties) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, each := range p {
		if i > 0 {
			b.WriteByte(',')
		}
		name, err := json.Marshal(each.name)
		if err != nil {
			return nil, err
		}
		value, err := json.Marshal(each.schema)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&b, "%s:%s", name, value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// Schema returns the JSON schema of a Labfile, indented. It accepts every
// Labfile that Parse accepts, and is what editors complete and check with; Parse
// also checks what a schema cannot say.
func Schema() ([]byte, error) {
	s := schemaOf(reflect.TypeFor[document](), "")
	s.Schema = "https://json-schema.org/draft/2020-12/schema"
	s.Title = "Labfile"
	s.Patterns = properties{{"^" + extension, &schema{Description: "Whatever you like: values for YAML aliases, or those of another program."}}}
	s.Description = "A lab: virtual machines, declared."
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(s); err != nil {
		return nil, fmt.Errorf("rendering the schema: %w", err)
	}
	return b.Bytes(), nil
}

// schemaOf returns the schema of a value of type t in a field with tag.
func schemaOf(t reflect.Type, tag reflect.StructTag) *schema {
	switch v := reflect.New(t).Interface().(type) {
	case scalar:
		return v.schema(tag)
	case composite:
		return v.schema(tag)
	}
	object := &schema{Type: "object", Additional: false}
	var short *schema
	for _, f := range fieldsOf(t) {
		s := schemaOf(f.typ, f.tag)
		if f.tag.Get("short") != "" {
			copied := *s
			short = &copied
		}
		s.Description = f.tag.Get("doc")
		if d := f.tag.Get("default"); d != "" {
			s.Description += " Default: " + d + "."
		}
		object.Properties = append(object.Properties, property{f.name, s})
		if f.tag.Get("need") != "" {
			object.Required = append(object.Required, f.name)
		}
	}
	var forms []*schema
	if short != nil {
		forms = append(forms, short)
	}
	if a, ok := reflect.New(t).Interface().(alternative); ok {
		for _, key := range a.alternatives() {
			object.OneOf = append(object.OneOf, &schema{Required: []string{key}})
		}
	}
	if t == reflect.TypeFor[check]() {
		forms = append(forms, &schema{Const: "ssh"})
	}
	if tag.Get("empty") == "ok" {
		object.Type = []string{"object", "null"}
	}
	if forms == nil {
		return object
	}
	return &schema{AnyOf: append(forms, object)}
}

// variable is the pattern of a value that holds a variable: what it will be is
// not known to a schema.
const variable = `\$\{`

// oneOf joins patterns of which one must match.
func oneOf(patterns ...string) string {
	var b bytes.Buffer
	for i, p := range patterns {
		if i > 0 {
			b.WriteByte('|')
		}
		fmt.Fprintf(&b, "(?:%s)", p)
	}
	return b.String()
}

func (t *text) schema(tag reflect.StructTag) *schema {
	s := &schema{Type: []string{"string", "number", "boolean"}, MinLength: 1}
	if words := tag.Get("oneof"); words != "" {
		return &schema{AnyOf: []*schema{{Enum: strings.Fields(words)}, {Type: "string", Pattern: variable}}}
	}
	switch tag.Get("form") {
	case "path":
		s.Pattern = oneOf(`^/`, variable)
	case "owner":
		s.Pattern = oneOf(ownerForm.String(), variable)
	case "mode":
		s.Pattern = oneOf(modeForm.String(), variable)
	case "label":
		s.Pattern = oneOf(labelPattern, variable)
	case "user":
		s.Pattern = oneOf(userName.String(), variable)
	}
	return s
}

func (t *anyText) schema(reflect.StructTag) *schema {
	return &schema{Type: []string{"string", "number", "boolean"}}
}

func (k *skip) schema(reflect.StructTag) *schema {
	return &schema{Type: []string{"boolean", "string", "number"}, MinLength: 1}
}

func (b *boolean) schema(reflect.StructTag) *schema {
	return &schema{Type: []string{"boolean", "string"}, Pattern: oneOf(`^(true|false)$`, variable)}
}

// labelPattern is lab.ValidLabel as a pattern.
const labelPattern = `^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`

func (i *integer) schema(tag reflect.StructTag) *schema {
	least, most := integerRange(tag)
	return &schema{
		Type: []string{"integer", "string"}, Minimum: &least, Maximum: &most,
		Pattern: oneOf(`^[0-9]+$`, variable),
	}
}

func (z *size) schema(reflect.StructTag) *schema {
	return &schema{Type: "string", Pattern: oneOf(`^[0-9]+(\.[0-9]+)? ?([KMGT]iB|[KMGT])$`, variable)}
}

func (t *duration) schema(reflect.StructTag) *schema {
	return &schema{Type: "string", Pattern: oneOf(`^([0-9]+(\.[0-9]*)?(ns|us|µs|ms|s|m|h))+$`, variable)}
}

func (f *forward) schema(reflect.StructTag) *schema {
	least, most := 1, 65535
	return &schema{
		Type: []string{"string", "integer"}, Minimum: &least, Maximum: &most,
		Pattern: oneOf(`^((127\.0\.0\.1|localhost):)?([0-9]{1,5}(-[0-9]{1,5})?:)?[0-9]{1,5}(-[0-9]{1,5})?(/(tcp|udp))?$`, variable),
	}
}

func (l *list[T]) schema(tag reflect.StructTag) *schema {
	return &schema{Type: "array", Items: schemaOf(reflect.TypeFor[T](), tag), MaxItems: maxItems}
}

func (t *table[T]) schema(reflect.StructTag) *schema {
	return &schema{
		Type: "object", Additional: schemaOf(reflect.TypeFor[T](), ""),
		PropertyNames: &schema{Pattern: labelPattern},
	}
}
