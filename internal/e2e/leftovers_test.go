// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// mark is the environment variable by which a process of a site is known.
const mark = "E2E_SITE"

// proc is a process of a site.
type proc struct {
	pid  int
	args []string
}

func (p proc) String() string { return fmt.Sprintf("process %d: %s", p.pid, strings.Join(p.args, " ")) }

// is reports whether the process runs the program.
func (p proc) is(name string) bool {
	return len(p.args) > 0 && strings.HasPrefix(filepath.Base(p.args[0]), name)
}

// processes returns all live processes of the site.
func (s *site) processes() []proc {
	s.Helper()
	return processesWith(func(env, args string) bool {
		return strings.Contains("\x00"+env, "\x00"+mark+"="+s.dir+"\x00") ||
			strings.Contains(args, s.dir) || strings.Contains(args, string(s.id))
	})
}

// processesBelow returns all processes of the sites below a folder.
func processesBelow(base string) []proc {
	return processesWith(func(env, _ string) bool { return strings.Contains("\x00"+env, "\x00"+mark+"="+base+"/") })
}

func processesWith(wanted func(env, args string) bool) []proc {
	files, _ := filepath.Glob("/proc/[0-9]*/environ") // the pattern is sound
	var found []proc
	for _, file := range files {
		env, err := os.ReadFile(file)
		if err != nil {
			continue // ended, or another user's
		}
		args, err := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
		if err != nil || len(args) == 0 || !wanted(string(env), string(args)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			continue
		}
		found = append(found, proc{pid, strings.Split(strings.TrimRight(string(args), "\x00"), "\x00")})
	}
	return found
}

// mine keeps the processes that name this site's lab, for two instances share a
// folder.
func (s *site) mine() []proc {
	s.Helper()
	var found []proc
	for _, p := range s.processes() {
		if strings.Contains(strings.Join(p.args, " "), string(s.id)) {
			found = append(found, p)
		}
	}
	return found
}

// supervisor returns the lab's background process, or 0.
func (s *site) supervisor() int {
	s.Helper()
	for _, p := range s.mine() {
		if p.is("lab") {
			return p.pid
		}
	}
	return 0
}

// kill ends a process of the site as if the machine's owner had.
func (s *site) kill(pid int) {
	s.Helper()
	if pid <= 1 {
		s.Fatalf("no process to kill: %v", s.processes())
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		s.Fatal(err)
	}
	s.ended(pid)
}

// ended waits for a process that was killed.
func (s *site) ended(pid int) {
	s.Helper()
	s.wait(fmt.Sprintf("process %d ends", pid), func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
}

// nothingLeft checks that no process, socket or file of the lab is left.
func (s *site) nothingLeft() {
	s.Helper()
	// A process that was told to end may need a moment to be gone.
	deadline := time.Now().Add(10 * time.Second)
	for len(s.left()) > 0 && time.Now().Before(deadline) {
		time.Sleep(50 * time.Millisecond)
	}
	for _, what := range s.left() {
		s.Errorf("left over: %s", what)
	}
}

// left lists everything of the lab that still exists.
func (s *site) left() []string {
	s.Helper()
	var found []string
	for _, p := range s.mine() {
		found = append(found, p.String())
	}
	for _, dir := range []string{s.w.data(), s.w.runtime()} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && strings.Contains(path, string(s.id)) {
				found = append(found, fmt.Sprintf("file %s (%s)", path, d.Type()))
			}
			return err
		})
		if err != nil {
			s.Fatal(err)
		}
	}
	unix, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		s.Fatal(err)
	}
	for line := range strings.Lines(string(unix)) {
		if strings.Contains(line, string(s.id)) {
			found = append(found, "socket "+strings.TrimSpace(line))
		}
	}
	return found
}
