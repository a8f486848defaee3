// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/labfile/lab/internal/lab"
)

var update = flag.Bool("update", false, "rewrite the golden files and the tables of docs/labfile.md")

// golden compares got with a golden file, or rewrites that.
func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("differs from %s (-want +got), -update rewrites it:\n%s", path, diff)
	}
}

// cases returns the Labfiles of a directory of testdata.
func cases(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", dir, "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no test cases in testdata/%s: %v", dir, err)
	}
	return files
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func testOptions() Options {
	env := map[string]string{
		"BOX": "builtin/debian-12", "PORT": "9", "EMPTY": "", "QUOTE": "a: [b", "NUL": "a\x00b",
		"LATIN1": "caf\xe9", "A": "a", "INJECT": "builtin/tiny\n    cpus: 64",
	}
	return Options{
		Vars: map[string]string{"PORT": "0"},
		LookupEnv: func(name string) (string, bool) {
			v, ok := env[name]
			return v, ok
		},
	}
}

func TestGood(t *testing.T) {
	for _, file := range cases(t, "good") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			o := testOptions()
			if filepath.Base(file) != "variables.yaml" {
				o.Vars = nil
			}
			l, err := Parse("/home/me/shop/Labfile", read(t, file), o)
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(l, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, strings.TrimSuffix(file, ".yaml")+".json", append(got, '\n'))
		})
	}
}

func TestBad(t *testing.T) {
	for _, file := range cases(t, "bad") {
		t.Run(filepath.Base(file), func(t *testing.T) {
			l, err := Parse("Labfile", read(t, file), testOptions())
			if l != nil {
				t.Errorf("got a lab along with the error: %+v", l)
			}
			var problems *Problems
			if !errors.As(err, &problems) {
				t.Fatalf("got %v, want *Problems", err)
			}
			for _, p := range problems.List {
				if p.File != "Labfile" {
					t.Errorf("%v: file is %q", p, p.File)
				}
			}
			golden(t, strings.TrimSuffix(file, ".yaml")+".txt", []byte(err.Error()+"\n"))
		})
	}
}

func TestTooManyProblems(t *testing.T) {
	data := "lab: shop\nmachines:\n  web:\n    box: builtin/tiny\n" + strings.Repeat("    cpu: 1\n    \"\": 1\n", 200)
	_, err := Parse("Labfile", []byte(data), Options{})
	var problems *Problems
	if !errors.As(err, &problems) {
		t.Fatalf("got %v, want *Problems", err)
	}
	// The first cpu is unknown, the others are duplicates; empty keys are all wrong.
	if len(problems.List) != 100 || problems.More != 300 {
		t.Errorf("got %d problems and %d more, want 100 and 300", len(problems.List), problems.More)
	}
	if last := "Labfile: 300 more problems"; !strings.HasSuffix(err.Error(), "\n"+last) {
		t.Errorf("the message does not end in %q:\n%s", last, err)
	}
}

func TestName(t *testing.T) {
	data := []byte("lab: shop\nmachines: {a: {box: builtin/tiny}}\n")
	for _, c := range []struct{ name, want, err string }{
		{"", "shop", ""},
		{"second", "second", ""},
		{"No Name", "", `Labfile: the name "No Name" given for this lab is not a name; ` + labelRule},
	} {
		l, err := Parse("Labfile", data, Options{Name: c.name})
		if got := message(err); got != c.err {
			t.Errorf("--name %q: got error %q, want %q", c.name, got, c.err)
		}
		if err == nil && l.Name != c.want {
			t.Errorf("--name %q: got the lab %q, want %q", c.name, l.Name, c.want)
		}
	}
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestUnusedVariable(t *testing.T) {
	data := []byte("lab: ${NAME:-shop}\nmachines: {a: {box: builtin/tiny}}\n")
	for _, c := range []struct{ given, want string }{
		{"NAME", ""},
		{"NAEM", `Labfile: the variable "NAEM" was given, but no value uses it; did you mean "NAME"?`},
		{"OTHER", `Labfile: the variable "OTHER" was given, but no value uses it`},
	} {
		_, err := Parse("Labfile", data, Options{Vars: map[string]string{c.given: "x"}})
		if got := message(err); got != c.want {
			t.Errorf("--var %s=x: got %q, want %q", c.given, got, c.want)
		}
	}
}

// within fails the test if f takes longer than a hostile file may keep anybody.
func within(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("takes longer than a minute")
	}
}

func TestLoadRefusesWhatIsNoFile(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := syscall.Mkfifo(path("pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path("dir"), 0o700); err != nil {
		t.Fatal(err)
	}
	big, err := os.Create(path("big"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(big.Truncate(100<<20), big.Close()); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ path, want string }{
		{path("pipe"), path("pipe") + ": not a regular file"},
		{path("dir"), path("dir") + ": a directory, not a file"},
		{path("big"), path("big") + ": larger than 1MiB"},
		{"/dev/zero", "/dev/zero: not a regular file"},
		{path("none"), "reading the Labfile: stat " + path("none") + ": no such file or directory"},
	} {
		within(t, func() {
			if _, err := Load(c.path, Options{}); message(err) != c.want {
				t.Errorf("got %q, want %q", message(err), c.want)
			}
		})
	}
	if _, err := Load(path("none"), Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: got %v, want fs.ErrNotExist", err)
	}
	if _, err := Parse("Labfile", make([]byte, maxFile+1), Options{}); message(err) != "Labfile: larger than 1MiB" {
		t.Errorf("Parse of too much: got %q", message(err))
	}
}

func TestLoad(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "real", "Labfile")
	if err := os.Mkdir(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("lab: shop\nmachines: {a: {box: builtin/tiny}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	l, err := Load(filepath.Join(dir, "link", "Labfile"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if l.File != file {
		t.Errorf("by way of a link, the file is %s; want %s", l.File, file)
	}

	t.Chdir(filepath.Dir(file))
	if err := os.WriteFile("Labfile", []byte("lab: shop\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Load(file, Options{})
	want := `Labfile:1:1: machines is missing; add "machines: {web: {box: builtin/tiny}}"`
	if message(err) != want {
		t.Errorf("got %q, want %q", message(err), want)
	}
}

func TestFind(t *testing.T) {
	root := t.TempDir()
	for _, f := range []string{"Labfile", "a/Labfile.yml", "a/Labfile.yaml", "a/b/c/x", "d/Labfile/x"} {
		path := filepath.Join(root, f)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ dir, want string }{
		{".", "Labfile"},
		{"a", "a/Labfile.yaml"},
		{"a/b/c", "a/Labfile.yaml"},
		{"d", "Labfile"},
		{"d/Labfile", "Labfile"},
	} {
		got, err := Find(filepath.Join(root, c.dir))
		if want := filepath.Join(root, c.want); err != nil || got != want {
			t.Errorf("in %s: got %q, %v; want %q", c.dir, got, err, want)
		}
	}
	_, err := Find("/proc")
	if !errors.Is(err, ErrNotFound) || message(err) != "no Labfile found in /proc or above" {
		t.Errorf("got %v, want ErrNotFound", err)
	}
}

// Another user's Labfile above, such as one in /tmp, is not used unasked.
func TestFindRefusesAnotherUsersAbove(t *testing.T) {
	root := t.TempDir()
	path, below := filepath.Join(root, "Labfile"), filepath.Join(root, "a", "b")
	if err := errors.Join(os.MkdirAll(below, 0o700), os.WriteFile(path, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	owner := os.Geteuid()
	if owner == 0 { // what is root's is everybody's
		if owner = 4242; os.Chown(path, owner, -1) != nil {
			t.Fatal("root cannot give a file away")
		}
	}
	for _, c := range []struct {
		dir string
		uid int
		ok  bool
	}{{below, owner, true}, {below, owner + 1, false}, {root, owner + 1, true}} {
		got, err := find(c.dir, c.uid)
		if c.ok {
			if err != nil || got != path {
				t.Errorf("in %s as %d: %q, %v", c.dir, c.uid, got, err)
			}
			continue
		}
		var foreign *ForeignError
		if !errors.As(err, &foreign) || got != "" {
			t.Fatalf("in %s as %d: %q, %v", c.dir, c.uid, got, err)
		}
		want := []string{
			fmt.Sprintf("the Labfile in force here, %s, belongs to another user (uid %d)", path, owner),
			"if you trust that user, name it: -f " + path,
		}
		if foreign.Error() != want[0] || foreign.Hint() != want[1] {
			t.Errorf("got %q, %q\nwant %q", foreign.Error(), foreign.Hint(), want)
		}
	}
}

// hostile are files of the greatest size that are all structure.
func hostile() map[string]string {
	fill := func(s string) string { return strings.Repeat(s, maxFile/len(s)) }
	var bomb strings.Builder
	bomb.WriteString("a0: &a0 [x, x]\n")
	for i := 1; bomb.Len() < maxFile/2; i++ {
		n, m := string(rune('a'+i%26))+strings.Repeat("z", i/26), string(rune('a'+(i-1)%26))+strings.Repeat("z", (i-1)/26)
		if i == 1 {
			m = "a0"
		}
		bomb.WriteString(n + ": &" + n + " [*" + m + ", *" + m + ", *" + m + ", *" + m + "]\n")
	}
	head := "lab: shop\nmachines:\n  web:\n    box: builtin/debian-12\n"
	room := maxFile - 1024
	list := func(key, item string) string {
		return head + "    " + key + ": [" + strings.Repeat(item, min(room/len(item), maxSeparators/8)) + "]\n"
	}
	var deps strings.Builder
	deps.WriteString("lab: shop\nmachines:\n")
	for c := 'a'; c <= 'z'; c++ {
		deps.WriteString("  " + string(c) + ": {box: builtin/tiny, depends_on: [" + strings.Repeat("a,b,c,d,e,", 20) + "]}\n")
	}
	return map[string]string{
		"flow":         fill("["),
		"block":        fill("- "),
		"keys":         fill("? "),
		"braces":       fill("{a: "),
		"lines":        fill("-\n"),
		"commas":       "[" + fill("a,")[2:] + "]",
		"most nodes":   "[" + strings.Repeat("a,", maxSeparators-10) + "]",
		"comments":     fill("#\n"),
		"duplicates":   fill("a:\n"),
		"words":        fill("word "),
		"anchors":      fill("- &a\n"),
		"aliases":      bomb.String(),
		"merges":       "x-a: &a {" + strings.Repeat("k: {<<: [*a, *a]}, ", 1000) + "}\n" + strings.Repeat("x-b: &b {<<: *a}\n", 1000),
		"many aliases": "x-a: &a [" + strings.Repeat("1,", 1000) + "]\nlab: [" + strings.Repeat("*a,", 10000) + "]\n",
		"dollars":      head + "    user_data: '#!" + strings.Repeat("$", room) + "'\n",
		"variables":    head + "    user_data: '" + strings.Repeat("${{A}}", room/6) + "'\n",
		"open":         head + "    user_data: '" + strings.Repeat("${{", room/3) + "'\n",
		"opened lines": head + "    user_data: |\n" + strings.Repeat("     ${{\n", room/9),
		"unset":        head + "    user_data: '" + strings.Repeat("${{B}}", room/6) + "'\n",
		"host":         head + "    user: '" + strings.Repeat("${A}", room/4) + "'\n",
		"host open":    head + "    user: '" + strings.Repeat("${", room/2) + "'\n",
		"host dollars": head + "    user: '" + strings.Repeat("$", room) + "'\n",
		"bad config":   head + "    user_data: |\n     #cloud-config\n" + strings.Repeat("     - a\n", room/9) + "     @\n",
		"dependencies": list("depends_on", "web-99,"),
		"cycles":       deps.String(),
		"ports":        list("ports", "80,"),
		"ready":        list("ready", "ssh,"),
		"pattern":      head + "    ready: [{console: '" + strings.Repeat("(x{1000}){1000}", room/15) + "'}]\n",
		"conditions":   head + "checks: [{run: x, stdout: " + strings.Repeat("{not: ", 5000) + "x" + strings.Repeat("}", 5000) + "}]\n",
		"expressions":  head + "checks: [{run: x, stdout: [" + strings.Repeat("'/(x{1000})(y{1000}/',", 99) + "'']}]\n",
		"repeats":      head + "    ready: [{console: '" + strings.Repeat("x{1000}", room/7) + "'}]\n",
		"patterns":     list("ready", "{console: '(((((x{10}){10}){10}){10}){10}'},"),
		"directives":   fill("%TAG !a! x\n"),
		"unclosed":     strings.Repeat("{a: [", 4000) + strings.Repeat("#\n", 1<<19-10000),
		"late error":   "[" + strings.Repeat("a,", maxSeparators/8) + "\n@",
		"wide":         head + "    " + strings.Repeat("k", room) + ": 1\n",
	}
}

func TestHostileFilesAreRefusedInBoundedTime(t *testing.T) {
	o := Options{Vars: map[string]string{"A": strings.Repeat("x", 1<<20)}}
	for name, data := range hostile() {
		t.Run(name, func(t *testing.T) {
			if len(data) > maxFile {
				t.Fatalf("the test's file has %d bytes", len(data))
			}
			within(t, func() {
				l, err := Parse("Labfile", []byte(data), o)
				if name == "dollars" {
					// A long text is a long text; all that is wrong is the option.
					if want := `Labfile: the variable "A" was given, but no value uses it`; message(err) != want {
						t.Errorf("got %v, want %q", err, want)
					}
					return
				}
				var problems *Problems
				if !errors.As(err, &problems) {
					t.Fatalf("got %v, %v; want *Problems", l, err)
				}
				if n := len(err.Error()); n > 64<<10 {
					t.Errorf("the message has %d bytes", n)
				}
			})
		})
	}
}

func TestDefaultsOfBoxes(t *testing.T) {
	if got, want := Builtins(), []string{"builtin/debian-12", "builtin/tiny"}; !cmp.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for _, c := range []struct {
		from       string
		usual, min lab.Bytes
	}{
		{"builtin/tiny", 128 * lab.MiB, 128 * lab.MiB},
		{"builtin/debian-12", 512 * lab.MiB, 256 * lab.MiB},
		{"./x.qcow2", 512 * lab.MiB, 0},
	} {
		if usual, least := DefaultMemory(c.from), MinMemory(c.from); usual != c.usual || least != c.min {
			t.Errorf("%s: got %v and at least %v, want %v and %v", c.from, usual, least, c.usual, c.min)
		}
	}
}
