// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"gopkg.in/yaml.v3"
)

// decoder fills tagged structs from YAML nodes. It goes on after a problem, so
// that one run finds them all; what it could not read stays unset.
//
// A key of a struct is a field with a yaml tag. Other tags of a field:
//
//	need    the key is required; the text is an example of it
//	range   the least and the greatest value, "1..100"
//	short   a scalar in place of the mapping is the value of this key
//	oneof   the words that a text can be
//	also    words of other tools for the same thing, for suggestions
//	default what holds without the key, for people
//	doc     what the key means, for people
//	guest   the value is text for the guest, which has dollars of its own
type decoder struct {
	*report
	vars   *variables // nil for a file without variables
	source source     // the text of the file
}

// scalar is a value that is written as one word or text.
type scalar interface {
	// parse reads the text. tag is that of the struct field.
	parse(text string, tag reflect.StructTag) error
	locate(at place)
	schema(tag reflect.StructTag) *schema
}

// composite is a value with parts that are not fields of a struct.
type composite interface {
	decode(d *decoder, n *yaml.Node, at place, tag reflect.StructTag)
	schema(tag reflect.StructTag) *schema
}

// bare is a struct that can also be written as a word that is not the value of
// any of its keys.
type bare interface {
	// parseBare reports whether it knows the word.
	parseBare(word string, at place) bool
}

// alternative is a struct of whose keys some exclude each other: a mapping has
// exactly one of them.
type alternative interface{ alternatives() []string }

// stranger is a struct that knows keys which are none of its own, though people look for
// them there.
type stranger interface {
	// foreign says what to do instead; empty for any other key.
	foreign(key string) string
}

// value decodes n into the value that the pointer into points to. at is where a
// problem with the value as a whole is reported: the key, or the list's item.
func (d *decoder) value(n *yaml.Node, at place, into any, tag reflect.StructTag) {
	if !d.plain(n, at.path) {
		return
	}
	switch v := into.(type) {
	case scalar:
		d.scalar(n, at, v, tag)
	case composite:
		v.decode(d, n, at, tag)
	default:
		d.object(n, at, into, tag)
	}
}

// extension begins the keys of a Labfile that hold whatever its author likes: values for
// YAML aliases, or those of another program.
const extension = "x-"

// plain refuses what YAML has for typing nodes, and for sharing them where writeOut did
// not write that out.
func (d *decoder) plain(n *yaml.Node, path string) bool {
	at := place{line: n.Line, column: n.Column, path: path}
	switch {
	case n.Kind == yaml.AliasNode:
		d.add(at, "YAML aliases (*%s) are not supported; write the value out, or use count for machines that are alike", shorten(n.Value))
	case n.Anchor != "":
		d.add(at, "YAML anchors (&%s) are not supported", shorten(n.Anchor))
	case n.Style&yaml.TaggedStyle != 0:
		d.add(at, "YAML tags (%s) are not supported", shorten(n.Tag))
	default:
		return true
	}
	return false
}

// null reports whether n is a value that was left out ("key:") or "null".
func null(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// describe names what n is, for a message that wanted something else.
func describe(n *yaml.Node) string {
	switch {
	case null(n):
		return "nothing"
	case n.Kind == yaml.MappingNode:
		return "a mapping"
	case n.Kind == yaml.SequenceNode:
		return "a list"
	}
	return fmt.Sprintf("%q", shorten(n.Value))
}

func (d *decoder) scalar(n *yaml.Node, at place, into scalar, tag reflect.StructTag) {
	if null(n) {
		d.add(at, "the value is missing")
		return
	}
	here := place{line: n.Line, column: n.Column, path: at.path}
	if n.Kind != yaml.ScalarNode {
		d.add(here, "wants a single value, not %s", describe(n))
		return
	}
	e := expansion{text: n.Value}
	if d.vars != nil {
		e = d.vars.expand(n.Value, tag.Get("guest") != "")
	}
	for _, f := range e.flaws {
		d.flaw(n, f.offset, at.path, f.message)
	}
	if len(e.flaws) > 0 {
		return
	}
	if strings.ContainsRune(e.text, 0) {
		d.add(here, "a NUL character is not allowed")
		return
	}
	err := into.parse(e.text, tag)
	var found flaws
	switch {
	case err == nil:
		into.locate(here)
	case errors.As(err, &found):
		for _, f := range found {
			d.flaw(n, e.origin(f.offset), at.path, f.message)
		}
	default:
		d.add(here, "%v", err)
	}
}

// flaw notes what is wrong at a byte of the value of n.
func (d *decoder) flaw(n *yaml.Node, offset int, path, message string) {
	if d.full() {
		d.more++
		return
	}
	d.add(d.source.within(n, offset, path), "%s", message)
}

// object decodes a mapping into a struct.
func (d *decoder) object(n *yaml.Node, at place, into any, tag reflect.StructTag) {
	v := reflect.ValueOf(into).Elem()
	fields := fieldsOf(v.Type())
	if l, ok := into.(interface{ locate(place) }); ok {
		l.locate(at)
	}
	if n.Kind == yaml.ScalarNode {
		if null(n) && tag.Get("empty") == "ok" {
			return
		}
		here := place{line: n.Line, column: n.Column, path: at.path}
		if b, ok := into.(bare); ok && b.parseBare(n.Value, here) {
			return
		}
		for _, f := range fields {
			if f.tag.Get("short") != "" && !null(n) {
				d.value(n, at, v.FieldByIndex(f.index).Addr().Interface(), f.tag)
				return
			}
		}
	}
	if n.Kind != yaml.MappingNode {
		d.add(at, "wants %s, not %s", wanted(fields), describe(n))
		return
	}
	if len(n.Content) == 0 && !needy(fields) && tag.Get("empty") != "ok" {
		d.add(at, "is empty; it wants %s", wanted(fields))
		return
	}
	seen := d.mapping(n, at, func(key string, keyAt place, value *yaml.Node) {
		for _, f := range fields {
			if f.name == key {
				d.value(value, keyAt, v.FieldByIndex(f.index).Addr().Interface(), f.tag)
				return
			}
		}
		if _, root := into.(*document); root && strings.HasPrefix(key, extension) {
			return
		}
		keyAt.path = at.path
		if f, ok := into.(stranger); ok && f.foreign(key) != "" {
			d.add(keyAt, "%s", f.foreign(key))
			return
		}
		if !d.full() {
			d.add(keyAt, "unknown key %q%s", shorten(key), suggestKey(key, fields))
		} else {
			d.more++
		}
	})
	for _, f := range fields {
		if example := f.tag.Get("need"); example != "" && !seen[f.name] {
			d.add(at, "%s is missing; add %q", f.name, f.name+": "+example)
		}
	}
}

// mapping calls each for every key of n that is a plain word and did not come
// before, and returns those keys.
func (d *decoder) mapping(n *yaml.Node, at place, each func(key string, keyAt place, value *yaml.Node)) map[string]bool {
	first := map[string]*yaml.Node{}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		keyAt := place{line: k.Line, column: k.Column, path: at.path}
		if !d.plain(k, at.path) {
			continue
		}
		if k.Kind != yaml.ScalarNode || k.Value == "" {
			d.add(keyAt, "a key must be a word, not %s", describe(k))
			continue
		}
		keyAt.path = join(at.path, k.Value)
		if before := first[k.Value]; before != nil {
			d.add(keyAt, "duplicate key; the first one is on line %d", before.Line)
			continue
		}
		first[k.Value], seen[k.Value] = k, true
		each(k.Value, keyAt, n.Content[i+1])
	}
	return seen
}

// join appends a key to a path.
func join(path, key string) string {
	if key = shorten(key); strings.ContainsFunc(key, func(c rune) bool { return !unicode.IsPrint(c) }) {
		key = strconv.Quote(key)
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

// field is a key of a struct.
type field struct {
	name  string
	index []int
	tag   reflect.StructTag
	typ   reflect.Type
}

// fieldsOf returns the keys of a struct type, those of embedded structs too.
func fieldsOf(t reflect.Type) []field {
	var fields []field
	for _, f := range reflect.VisibleFields(t) {
		if name := f.Tag.Get("yaml"); name != "" {
			fields = append(fields, field{name, f.Index, f.Tag, f.Type})
		}
	}
	return fields
}

func namesOf(fields []field) []string {
	names := make([]string, len(fields))
	for i, f := range fields {
		names[i] = f.name
	}
	return names
}

// needy reports whether a mapping with these keys requires some of them.
func needy(fields []field) bool {
	return slices.ContainsFunc(fields, func(f field) bool { return f.tag.Get("need") != "" })
}

// wanted says what a mapping with these keys is like.
func wanted(fields []field) string {
	if !needy(fields) {
		return "a mapping with one of the keys " + listed(namesOf(fields))
	}
	var example []string
	for _, f := range fields {
		if need := f.tag.Get("need"); need != "" {
			example = append(example, f.name+": "+need)
		}
	}
	return fmt.Sprintf("a mapping, such as {%s}", strings.Join(example, ", "))
}

// suggestKey returns the end of a message about an unknown key.
func suggestKey(key string, fields []field) string {
	for _, f := range fields {
		for word := range strings.FieldsSeq(f.tag.Get("also")) {
			if word == strings.ToLower(key) {
				return fmt.Sprintf("; did you mean %q?", f.name)
			}
		}
	}
	return didYouMean(key, namesOf(fields), "; known keys are "+listed(namesOf(fields)))
}

// maxListed is how many keys a message names.
const maxListed = 24

// listed joins names for a message.
func listed(names []string) string {
	if more := len(names) - maxListed; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:maxListed], ", "), more)
	}
	return strings.Join(names, ", ")
}

// list is a sequence of values.
type list[T any] struct {
	place
	items []T
}

// maxItems bounds the length of lists.
const maxItems = 100

func (l *list[T]) decode(d *decoder, n *yaml.Node, at place, tag reflect.StructTag) {
	if n.Kind != yaml.SequenceNode {
		d.add(at, "wants a list, such as [%s], not %s", tag.Get("example"), describe(n))
		return
	}
	if len(n.Content) > maxItems {
		d.add(at, "has %d items; at most %d are allowed", len(n.Content), maxItems)
		return
	}
	l.locate(at)
	l.items = make([]T, len(n.Content))
	for i, item := range n.Content {
		here := place{line: item.Line, column: item.Column, path: fmt.Sprintf("%s[%d]", at.path, i)}
		d.value(item, here, &l.items[i], tag)
	}
}

// table is a mapping from names that the user chooses to values. It keeps the
// order of the file.
type table[T any] struct {
	place
	rows []row[T]
}

type row[T any] struct {
	key   place
	name  string
	value T
}

func (t *table[T]) decode(d *decoder, n *yaml.Node, at place, tag reflect.StructTag) {
	if n.Kind != yaml.MappingNode {
		d.add(at, "wants a mapping of names, such as {%s}, not %s", tag.Get("example"), describe(n))
		return
	}
	t.locate(at)
	d.mapping(n, at, func(key string, keyAt place, value *yaml.Node) {
		t.rows = append(t.rows, row[T]{key: keyAt, name: key})
		d.value(value, keyAt, &t.rows[len(t.rows)-1].value, tag)
	})
}
