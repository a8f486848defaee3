// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"gopkg.in/yaml.v3"
)

// compiled returns the generated schema as an independent validator knows it.
func compiled(t *testing.T) *jsonschema.Schema {
	t.Helper()
	data, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	if err := c.AddResource("labfile.json", doc); err != nil {
		t.Fatal(err)
	}
	s, err := c.Compile("labfile.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// instance returns a YAML document as an editor hands it to a validator.
func instance(t *testing.T, data []byte) any {
	t.Helper()
	var v any
	if err := yaml.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return stringKeys(v)
}

// stringKeys makes the keys of mappings strings, as they are in JSON.
func stringKeys(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			v[k] = stringKeys(e)
		}
	case map[any]any:
		out := map[string]any{}
		for k, e := range v {
			out[fmt.Sprint(k)] = stringKeys(e)
		}
		return out
	case []any:
		for i, e := range v {
			v[i] = stringKeys(e)
		}
	}
	return v
}

func TestSchemaAcceptsWhatParseAccepts(t *testing.T) {
	s := compiled(t)
	files := append(cases(t, "good"), "starter.yaml", "../../Labfile.example")
	for _, file := range files {
		if err := s.Validate(instance(t, read(t, file))); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}

func TestSchemaRefuses(t *testing.T) {
	s := compiled(t)
	for _, name := range []string{"comment", "keys", "kinds", "list", "missing", "names", "none", "null", "numbers", "ports", "ready", "scalar"} {
		data := read(t, filepath.Join("testdata", "bad", name+".yaml"))
		if name == "keys" {
			// No reader of YAML hands duplicate keys to a validator.
			data = []byte("lab: shop\nmachnies: {}\nmachines: {web: {box: builtin/tiny}}\n")
		}
		if err := s.Validate(instance(t, data)); err == nil {
			t.Errorf("the schema accepts testdata/bad/%s.yaml", name)
		}
	}
	head := "lab: shop\nmachines:\n  web:\n    box: builtin/tiny\n    "
	for _, line := range []string{
		"memroy: 1GiB", "memory: 512", "memory: 512MB", "cpus: 0", "cpus: many", "cpus: 1.5", "count: 101", "ports: 80",
		`ports: ["0.0.0.0:80:80"]`, "ports: [70000]", "ready: [port]", "ready: [{port: 80, exec: a}]", "ready: [{timeout: 1s}]",
		"ready: [{port: 80, timeout: 30}]", "ready: [{http: {path: /}}]", "depends_on: web", "user: Rob Ert", "ready: [{}]",
		"provision: [true]", "provision: [{}]", "provision: [{run: a}]", "provision: [{shell: {}}]", "provision: [{shell: {run: a, script: b}}]",
		"provision: [{file: {from: a}}]", "provision: [{file: {to: /a}}]", "provision: [{file: {from: a, to: b}}]", "provision: [{file: {from: a, to: /b, mode: u+x}}]",
		"boot: [true]", "boot: [{}]", "boot: [{timeout: 1m}]", "boot: [{file: {from: a, to: /a}}]", "boot: [{shell: a, timeout: 10}]", "boot: {shell: a}",
		"volumes: [data]", "volumes: [{name: a, mount: /a}]", "volumes: [{name: a, size: 1GiB, fs: ext3, mount: /a}]", "mounts: [{from: a}]", "mounts: [{from: a, to: b}]",
		"replace: fast", "replace: {strategy: stop-first, keep: -1}", "on_shell: no", "max_age: 1d", "max_age: {then: stop}", "idle: {after: 1h, then: sleep}",
	} {
		data := []byte(head + line + "\n")
		if err := s.Validate(instance(t, data)); err == nil {
			t.Errorf("the schema accepts %q", line)
		}
		if _, err := Parse("Labfile", data, Options{}); err == nil {
			t.Errorf("Parse accepts %q", line)
		}
	}
}

func TestSchemaRefusesChecks(t *testing.T) {
	s := compiled(t)
	const head = "lab: shop\nmachines: {web: {box: builtin/tiny}}\nchecks: "
	for _, value := range []string{
		"{port: 80}", "[port]", "[{}]", "[{on: web}]", "[{port: 80, file: /x}]", "[{file: x}]", "[{run: a, stduot: b}]", "[{run: a, timeout: 3}]",
		"[{run: a, exit-status: [1]}]", "[{run: a, stdout: {have-lne: 3}}]", "[{run: a, stdout: {}}]", "[{run: a, retries: -1}]", "[{http: \"http://a\", insecure: no}]",
	} {
		data := []byte(head + value + "\n")
		if err := s.Validate(instance(t, data)); err == nil {
			t.Errorf("the schema accepts %q", value)
		}
		if _, err := Parse("Labfile", data, Options{}); err == nil {
			t.Errorf("Parse accepts %q", value)
		}
	}
}

func TestSchemaDescribesEveryKey(t *testing.T) {
	data, err := Schema()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"$schema": "https://json-schema.org/draft/2020-12/schema"`,
		`"description": "Virtual processors. Default: 1."`,
		`"additionalProperties": false`,
	} {
		if !strings.Contains(string(data), want) {
			t.Errorf("the schema lacks %s", want)
		}
	}
	if strings.Contains(string(data), `"description": ""`) {
		t.Error("a key has no description")
	}
}

func TestExampleAndStarterAreGood(t *testing.T) {
	l, err := Load("../../Labfile.example", Options{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range l.Machines {
		names = append(names, string(m.Name))
	}
	if got := strings.Join(names, " "); got != "db web-1 web-2" {
		t.Errorf("the machines of Labfile.example are %s", got)
	}
	if _, err := Load("../../Labfile.example", Options{Vars: map[string]string{"BASE": "builtin/tiny", "DB_PORT": "2222"}}); err != nil {
		t.Error(err)
	}
	l, err = Parse("Labfile", Starter("try-1"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if l.Name != "try-1" {
		t.Errorf("the starter for try-1 is called %q", l.Name)
	}
}

// What the starter shows in comments must be right as well.
func TestStarterComments(t *testing.T) {
	text := string(Starter("try"))
	for from, to := range map[string]string{
		"    # cpus:": "    cpus:", "    # memory:": "    memory:", "    # disk:": "    disk:",
		"    # count:": "    count:", "    # mounts:": "    mounts:", "      # - ": "      - ",
		"#\n# boxes:\n#   base:": "boxes:\n  base:", "#   noble:\n#     from:": "  noble:\n    from:",
		"#     checksum: sha256:…": "    checksum: sha256:" + strings.Repeat("0", 64),
	} {
		if !strings.Contains(text, from) {
			t.Errorf("the starter has no %q", from)
		}
		text = strings.ReplaceAll(text, from, to)
	}
	l, err := Parse("Labfile", []byte(text), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(l.Machines) != 3 || len(l.Machines[1].Ready) != 4 || len(l.Machines[1].Mounts) != 1 {
		t.Errorf("got %+v", l.Machines)
	}
}
