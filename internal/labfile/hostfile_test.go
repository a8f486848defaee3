// SPDX-License-Identifier: Apache-2.0

package labfile

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// What the Labfile names on this host must be there only when machines
// are made of it.
func TestHostFiles(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "Labfile")
	text := `lab: shop
machines:
  web:
    box: builtin/tiny
    provision:
      - shell: ./none.sh --quiet
      - shell: ./there.sh --quiet
      - shell: {script: folder}
      - shell: {script: "${DIR}/gone.sh"}
      - file: {from: there.sh/none, to: /x}
      - file: {from: folder, to: /x}
      - file: {from: pipe, to: /x}
    mounts:
      - ./none:/none
      - {from: there.sh, to: /file}
      - ./folder:/folder
      - {from: ~/src, to: /src}
    boot:
      - shell: ./gone.sh
      - shell: ./there.sh
      - shell: {script: folder}
`
	for _, err := range []error{
		os.WriteFile(file, []byte(text), 0o600),
		os.WriteFile(filepath.Join(dir, "there.sh"), nil, 0o600),
		os.Mkdir(filepath.Join(dir, "folder"), 0o700),
		syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	o := Options{HostFiles: true, Vars: map[string]string{"DIR": "/nowhere"}}
	_, err := Load(file, o)
	want := `Labfile:6:16: machines.web.provision[0].shell: there is no script DIR/none.sh; make it, or correct the path
Labfile:8:25: machines.web.provision[2].shell.script: DIR/folder is not a file
Labfile:9:25: machines.web.provision[3].shell.script: there is no script /nowhere/gone.sh; make it, or correct the path
Labfile:10:22: machines.web.provision[4].file.from: DIR/there.sh/none cannot be read: not a directory
Labfile:12:22: machines.web.provision[6].file.from: DIR/pipe is neither a file nor a folder
Labfile:14:9: machines.web.mounts[0]: there is no folder DIR/none; make it, or correct the path
Labfile:15:16: machines.web.mounts[1].from: DIR/there.sh is not a folder; mount the folder that it is in, or put the file into the image by a provision step (file: …)
Labfile:17:16: machines.web.mounts[3].from: ~ is not expanded; write ${HOME}/src
Labfile:19:16: machines.web.boot[0].shell: there is no script DIR/gone.sh; make it, or correct the path
Labfile:21:25: machines.web.boot[2].shell.script: DIR/folder is not a file`
	if err == nil {
		t.Fatal("nothing is wrong")
	}
	got := strings.ReplaceAll(strings.ReplaceAll(err.Error(), file, "Labfile"), dir, "DIR")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	o.HostFiles = false
	if _, err := Load(file, o); err == nil || strings.Count(err.Error(), "\n") > 0 {
		t.Errorf("without a look at files: %v", err)
	}
}

// Whatever is left out of a long path, it is not the name of the file.
func TestPathEnd(t *testing.T) {
	deep := "/home/" + strings.Repeat("ä", 100) + "/files/none.sh"
	for path, want := range map[string]string{
		"/a/b":                  "/a/b",
		deep:                    deep,
		"/begin" + deep + "":    "/begin" + deep,
		"/long/x" + deep + deep: "…" + strings.Repeat("ä", 3) + "/files/none.sh" + deep,
	} {
		if got := pathEnd(path); got != want {
			t.Errorf("%q is shown as %q, want %q", path, got, want)
		}
	}
}
