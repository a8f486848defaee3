// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseDotenv(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want map[string]string
	}{
		"plain":    {"A=1\nB=two words  \n\n# C=3\n  D=x=y\nE=\n", map[string]string{"A": "1", "B": "two words", "D": "x=y", "E": ""}},
		"export":   {"export A=1\nexport\tB='2'\nexported=3\n", map[string]string{"A": "1", "B": "2", "exported": "3"}},
		"comments": {"A=1 # one\nB=a#b\nC=#\nD='x' # y\n", map[string]string{"A": "1", "B": "a#b", "C": "", "D": "x"}},
		"quotes":   {`A='$HOME ${B} \n "'` + "\n" + `B="a\tb\n\"c\" \$D \\ 'e' \q"` + "\n", map[string]string{"A": `$HOME ${B} \n "`, "B": "a\tb\n\"c\" $D \\ 'e' \\q"}},
		"lines":    {"A='one\n two'\nB=\"-----\nxyz\n\"\nC=3", map[string]string{"A": "one\n two", "B": "-----\nxyz\n", "C": "3"}},
		"dollars":  {"A=5$\nB=$5 $ $.\nC=\\$x\n", map[string]string{"A": "5$", "B": "$5 $ $.", "C": `\$x`}},
		"again":    {"A=1\nA=2\n", map[string]string{"A": "2"}},
		"windows":  {"\ufeffA=1\r\nB=\"x\"\r\n", map[string]string{"A": "1", "B": "x"}},
		"empty":    {"", map[string]string{}},
	} {
		got, problems, _ := parseDotenv(".env", []byte(c.text))
		if diff := cmp.Diff(c.want, got); diff != "" || len(problems) > 0 {
			t.Errorf("%s: %v\n%s", name, problems, diff)
		}
	}
}

func TestDotenvProblems(t *testing.T) {
	text := `A
  export B
C = 1
D= 2
2E=3
F=$HOME/x
G="a
b ${C}"
H='x' y
I="x"#y
é=1
export J=x$(id)
L='open
K=1
`
	_, problems, _ := parseDotenv(".env", []byte(text))
	got := (&Problems{List: problems}).Error()
	want := `.env:1:1: "A" is not a variable; write NAME=VALUE
.env:2:10: "B" is not a variable; write NAME=VALUE
.env:3:1: write C=VALUE, without spaces around the =
.env:4:1: write D=VALUE, without spaces around the =
.env:5:1: "2E" is not the name of a variable
.env:6:3: no variable is filled in here; put a value with a dollar into single quotes
.env:8:3: no variable is filled in here; put a value with a dollar into single quotes
.env:9:3: there is more behind the closing quote: "y"
.env:10:3: there is more behind the closing quote: "#y"
.env:11:1: "é" is not the name of a variable
.env:12:11: no variable is filled in here; put a value with a dollar into single quotes
.env:13:3: the quote that begins here is not closed`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, problems, _ := parseDotenv(".env", []byte("A=\xff")); len(problems) != 1 || problems[0].String() != ".env: not UTF-8 text" {
		t.Errorf("of bytes: %v", problems)
	}
}

// What is given on the command line comes before the environment, that before the
// file, and a default last.
func TestVariablesPrecedence(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(".env", "A=file\nB=file\nC=file\nE=\n")
	write("Labfile", `lab: shop
machines:
  web:
    box: builtin/tiny
    provision:
      - shell: echo ${{ A:-default }} ${{ B:-default }} ${{ C:-default }} ${{ D:-default }} ${{ E:-default }}
`)
	o := Options{
		Vars:      map[string]string{"A": "option"},
		LookupEnv: func(name string) (string, bool) { return "environment", name == "A" || name == "B" },
	}
	l, err := Load("Labfile", o)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := l.Machines[0].Provision[0].Shell, "echo option environment file default default"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}

	// Its problems are told with those of the Labfile, if they are about a variable that
	// is looked for, or if one has no value.
	write(".env", "A=file\nnonsense\nUSER=$X\n")
	told := func(user, want string) {
		t.Helper()
		write("Labfile", "lab: shop\nmachines:\n  web: {box: builtin/tiny, cpus: 0, user: \""+user+"\"}\n")
		_, err = Load("Labfile", Options{})
		var problems *Problems
		if want = "Labfile:3:34: machines.web.cpus: 0 is not between 1 and 64\n" + want; !errors.As(err, &problems) || err.Error() != strings.TrimSpace(want) {
			t.Errorf("of %s: got %v, want %s", user, err, want)
		}
	}
	const unfilled = ".env:3:6: no variable is filled in here; put a value with a dollar into single quotes"
	told("${OTHER:-me}", "")
	told("${USER:-me}", unfilled)
	told("${OTHER}", "Labfile:3:44: machines.web.user: OTHER is not set; use --var OTHER=VALUE, or give a default with ${OTHER:-default}, or write $${OTHER} to keep it as it is\n"+
		".env:2:1: \"nonsense\" is not a variable; write NAME=VALUE\n"+unfilled)
	write("Labfile", "lab: shop\nmachines:\n  web: {box: builtin/tiny}\n")
	if _, err = Load("Labfile", Options{}); err != nil {
		t.Errorf("a file that no variable is looked for in: %v", err)
	}
	if err := os.Remove(".env"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(".env", 0o700); err != nil {
		t.Fatal(err)
	}
	write("Labfile", "lab: ${NAME:-shop}\nmachines:\n  web: {box: builtin/tiny}\n")
	if _, err = Load("Labfile", Options{}); err != nil {
		t.Errorf("a folder of that name: %v", err)
	}
}

// In a shared folder, another user's file sets no variable.
func TestDotenvOwner(t *testing.T) {
	me, ada, eve := os.Geteuid(), os.Geteuid()+1, os.Geteuid()+2
	d := &dotenv{owner: ada}
	for uid, want := range map[int]bool{me: true, 0: true, ada: true, eve: false} {
		if d.trusts(uid) != want {
			t.Errorf("a file of %d beside a Labfile of %d, for %d: %v", uid, ada, me, !want)
		}
	}
	if me != 0 {
		return // only root can give files away
	}
	dir := t.TempDir()
	file, env := filepath.Join(dir, "Labfile"), filepath.Join(dir, ".env")
	if err := errors.Join(
		os.WriteFile(file, []byte("lab: ${NAME:-shop}\nmachines:\n  web: {box: builtin/tiny}\n"), 0o644),
		os.WriteFile(env, []byte("NAME=trap\n"), 0o644), os.Chown(env, eve, eve),
	); err != nil {
		t.Fatal(err)
	}
	if l, err := Load(file, Options{}); err != nil || l.Name != "shop" {
		t.Errorf("another user's file: %+v, %v", l, err)
	}
}

// FuzzDotenv finds that any input is variables, or problems with places; and that what
// is put into single quotes comes back.
func FuzzDotenv(f *testing.F) {
	for _, seed := range []string{"A=1\n", "export B='x\ny' # z\n", "C=\"\\n\\\"\"\n", "D=$x\n", "E='", "\ufeffF = \r\n"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		vars, problems, names := parseDotenv(".env", data)
		if len(names) != len(problems) {
			t.Errorf("%d names of %d problems", len(names), len(problems))
		}
		if len(problems) > maxProblems {
			t.Errorf("%d problems", len(problems))
		}
		for _, p := range problems {
			if p.Message == "" || p.Line > 0 != (p.Column > 0) {
				t.Errorf("%+v", p)
			}
		}
		var text string
		for name, value := range vars {
			if !variableName.MatchString(name) {
				t.Errorf("name %q", name)
			}
			for i := range len(value) {
				if value[i] == '\'' {
					return
				}
			}
			text += name + "='" + value + "'\n"
		}
		again, problems, _ := parseDotenv(".env", []byte(text))
		if len(problems) > 0 || (len(vars) > 0 && !cmp.Equal(vars, again)) {
			t.Errorf("%v\n%s", problems, cmp.Diff(vars, again))
		}
	})
}
