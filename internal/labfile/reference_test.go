// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const reference = "../../docs/labfile.md"

// keyTable renders the keys of a type as a table.
func keyTable(t reflect.Type) string {
	var b strings.Builder
	b.WriteString("| key | value | default | meaning |\n| --- | --- | --- | --- |\n")
	for _, f := range fieldsOf(t) {
		standard := f.tag.Get("default")
		if f.tag.Get("need") != "" {
			standard = "(required)"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.name, valueText(f), standard, strings.ReplaceAll(f.tag.Get("doc"), "|", `\|`))
	}
	return b.String()
}

// valueText says in a few words what a key takes.
func valueText(f field) string {
	lo, hi, _ := strings.Cut(f.tag.Get("range"), "..")
	switch reflect.New(f.typ).Interface().(type) {
	case *text:
		if words := f.tag.Get("oneof"); words != "" {
			return "`" + strings.Join(strings.Fields(words), "`, `") + "`"
		}
		return map[string]string{"": "text", "label": "name", "user": "user name", "path": "path of the guest", "owner": "owner", "mode": "mode"}[f.tag.Get("form")]
	case *userData:
		return "text"
	case *integer:
		return fmt.Sprintf("number, %s to %s", lo, hi)
	case *size:
		return fmt.Sprintf("size, %s to %s", lo, hi)
	case *duration:
		return fmt.Sprintf("duration, %s to %s", lo, hi)
	case *list[text]:
		return "list of names"
	case *list[forward]:
		return "list of forwards"
	case *list[check]:
		return "list of checks"
	case *anyText:
		return "text"
	case *skip:
		return "`true`, `false` or a reason"
	case *boolean:
		return "`true` or `false`"
	case *list[anyText]:
		return "list of texts"
	case *list[stepEntry], *list[bootEntry]:
		return "list of steps"
	case *list[volumeEntry]:
		return "list of volumes"
	case *list[mountEntry]:
		return "list of mounts"
	case *list[exposeEntry]:
		return "list of ports"
	case *shellStep:
		return "program or script, or a mapping"
	case *fileStep:
		return "mapping"
	case *list[testEntry]:
		return "list of checks"
	case *names:
		return "name, or list of names"
	case *subject:
		return map[string]string{"run": "command", "port": "port", "http": "URL", "file": "path of the guest"}[f.name] + map[bool]string{true: "name"}[!slices.Contains([]string{"run", "port", "http", "file"}, f.name)]
	case *matcher:
		return map[string]string{"bool": "`true` or `false`", "number": "number, or condition", "mode": "octal mode, or condition", "text": "text, or condition", "list": "elements, or condition", "lines": "patterns, or condition"}[f.tag.Get("fact")]
	case *replaceEntry:
		return "strategy, or a mapping"
	case *ageEntry, *idleEntry:
		return "duration, or a mapping"
	case *table[boxEntry], *table[roleEntry]:
		return "mapping of names"
	case *sshCheck:
		return "nothing"
	case *portCheck, *httpCheck:
		return "port, or a mapping"
	case *execCheck:
		return "command, or a mapping"
	case *consoleCheck:
		return "pattern, or a mapping"
	}
	return ""
}

func TestReferenceHasEveryKey(t *testing.T) {
	tables := map[string]reflect.Type{
		"document": reflect.TypeFor[document](),
		"machine":  reflect.TypeFor[roleEntry](),
		"box":      reflect.TypeFor[boxEntry](),
		"check":    reflect.TypeFor[check](),
		"http":     reflect.TypeFor[httpCheck](),
		"step":     reflect.TypeFor[stepEntry](),
		"boot":     reflect.TypeFor[bootEntry](),
		"shell":    reflect.TypeFor[shellStep](),
		"file":     reflect.TypeFor[fileStep](),
		"volume":   reflect.TypeFor[volumeEntry](),
		"mount":    reflect.TypeFor[mountEntry](),
		"expose":   reflect.TypeFor[exposeEntry](),
		"replace":  reflect.TypeFor[replaceEntry](),
		"test":     reflect.TypeFor[testEntry](),
		"age":      reflect.TypeFor[ageEntry](),
	}
	data := string(read(t, reference))
	section := regexp.MustCompile(`(?s)(<!-- begin: (\w+) [^\n]*-->\n)(.*?)(<!-- end -->)`)
	seen := map[string]bool{}
	got := section.ReplaceAllStringFunc(data, func(s string) string {
		m := section.FindStringSubmatch(s)
		typ, ok := tables[m[2]]
		if !ok {
			t.Errorf("%s has a table of %q, which is no type", reference, m[2])
			return s
		}
		seen[m[2]] = true
		for _, f := range fieldsOf(typ) {
			if valueText(f) == "" || f.tag.Get("doc") == "" {
				t.Errorf("the key %s of %s has no description", f.name, m[2])
			}
		}
		return m[1] + "\n" + keyTable(typ) + "\n" + m[4]
	})
	for name := range tables {
		if !seen[name] {
			t.Errorf("%s has no table of %s", reference, name)
		}
	}
	if *update {
		if err := os.WriteFile(reference, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(data, got); diff != "" {
		t.Errorf("%s is not what the types say (-is +should be); -update rewrites it:\n%s", reference, diff)
	}
}

// The tables leave out keys that the text must name.
func TestReferenceExplainsShortForms(t *testing.T) {
	data := string(read(t, reference))
	for _, typ := range []reflect.Type{
		reflect.TypeFor[portCheck](), reflect.TypeFor[httpCheck](), reflect.TypeFor[execCheck](), reflect.TypeFor[consoleCheck](),
	} {
		for _, f := range fieldsOf(typ) {
			if f.tag.Get("short") != "" && !strings.Contains(data, "{"+f.name+": ") {
				t.Errorf("%s does not show {%s: …} of %v", reference, f.name, typ)
			}
		}
	}
}

func TestReferenceExamplesAreGood(t *testing.T) {
	data := string(read(t, reference))
	schema := compiled(t)
	blocks := regexp.MustCompile("(?s)```yaml( machine)?\n(.*?)```").FindAllStringSubmatch(data, -1)
	if len(blocks) < 4 {
		t.Fatalf("found only %d examples", len(blocks))
	}
	for _, b := range blocks {
		text := b[2]
		if b[1] != "" {
			text = "lab: shop\nmachines:\n  web:\n    box: builtin/debian-12\n    " + strings.ReplaceAll(text, "\n", "\n    ")
		}
		if _, err := Parse("example", []byte(text), Options{}); err != nil {
			t.Errorf("%v\n%s", err, text)
		}
		if err := schema.Validate(instance(t, []byte(text))); err != nil {
			t.Errorf("%v\n%s", err, text)
		}
	}
	for _, name := range Builtins() {
		if want := fmt.Sprintf("| `%s` | ", name); !strings.Contains(data, want) || !strings.Contains(data, fmt.Sprintf("needs %s of memory", MinMemory(name))) {
			t.Errorf("%s does not describe %s, or not the memory it needs", reference, name)
		}
	}
}
