// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInclude(t *testing.T) {
	const line = `Include "/data/lab/ssh/*.conf"`
	const added = includeMark + "\n" + line + "\n"
	for name, tc := range map[string]struct{ config, with, without string }{
		"none":           {"", added, ""},
		"with others":    {"Host *\n  User me\n", added + "Host *\n  User me\n", "Host *\n  User me\n"},
		"no last end":    {"Host a\n  Port 1", added + "Host a\n  Port 1", "Host a\n  Port 1"},
		"CRLF":           {"Host a\r\n  Port 1\r\n", added + "Host a\r\n  Port 1\r\n", "Host a\r\n  Port 1\r\n"},
		"there already":  {added + "Host *\n", added + "Host *\n", "Host *\n"},
		"below its own":  {"# mine\nUser me\n" + line + "\nHost *\n", "# mine\nUser me\n" + line + "\nHost *\n", "# mine\nUser me\nHost *\n"},
		"within a host":  {"Host a\n" + line + "\n", added + "Host a\n", "Host a\n"},
		"within a match": {"match all\n  " + line + "\n", added + "match all\n", "match all\n"},
		"behind a tab":   {"Host\ta\n" + line + "\n", added + "Host\ta\n", "Host\ta\n"},
		"behind =":       {"Host=a\n" + line + "\n", added + "Host=a\n", "Host=a\n"},
		"in quotes":      {"Host\"a\"\n" + line + "\n", added + "Host\"a\"\n", "Host\"a\"\n"},
		"another's":      {"Include \"/other/ssh/*.conf\"\n", added + "Include \"/other/ssh/*.conf\"\n", "Include \"/other/ssh/*.conf\"\n"},
	} {
		got := addInclude(tc.config, line)
		if got != tc.with {
			t.Errorf("%s: added:\n%s\nwant\n%s", name, got, tc.with)
		}
		if again := addInclude(got, line); again != got {
			t.Errorf("%s: added twice:\n%s", name, again)
		}
		if got := dropInclude(got, line); got != tc.without {
			t.Errorf("%s: dropped:\n%s\nwant\n%s", name, got, tc.without)
		}
	}
}

// What somebody else writes meanwhile is not lost.
func TestEditSSHMeanwhile(t *testing.T) {
	home := t.TempDir()
	a := &app{Config: Config{Getenv: func(string) string { return home }}}
	path := filepath.Join(home, ".ssh", "config")
	tries := 0
	if err := a.editSSH(func(old string) string {
		if tries++; tries < 3 {
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(old+"User me\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return "Port 1\n" + old
	}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != "Port 1\nUser me\nUser me\n" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := a.editSSH(func(old string) string {
		if err := os.WriteFile(path, []byte(old+"#"), 0o600); err != nil {
			t.Fatal(err)
		}
		return "never"
	}); !errors.Is(err, errEdited) {
		t.Errorf("got %v, want errEdited", err)
	}
}

func FuzzInclude(f *testing.F) {
	const line = `Include "/data/lab/ssh/*.conf"`
	f.Add("Host *\n  User me\n")
	f.Add("\r\n\x00Match all\n" + line)
	f.Fuzz(func(t *testing.T, config string) {
		with := addInclude(config, line)
		if again := addInclude(with, line); again != with {
			t.Errorf("added twice:\n%q\n%q", with, again)
		}
		if !strings.Contains(config, line) {
			if got := dropInclude(with, line); got != config {
				t.Errorf("got %q, want %q", got, config)
			}
		}
	})
}
