// SPDX-License-Identifier: Apache-2.0

package supervise

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// readyEnv names the file descriptor on which a spawned supervisor says that it
// serves.
const readyEnv = "LAB_SUPERVISOR_READY"

// maxLog bounds the log of earlier supervisors, in bytes; a supervisor itself says
// little, whatever its guests do.
const maxLog = 256 << 10

// startTimeout bounds how long a supervisor may take to serve. It does so within
// some hundredths of a second on an idle machine.
const startTimeout = 30 * time.Second

// Spawn runs self with args as a process of its own session, detached from the
// terminal, with its output appended to the file logPath. It returns when the
// process has called what Ready returned, or has ended without. The error then
// carries the last lines it said.
func Spawn(self string, args []string, logPath string) error {
	log, err := openLog(logPath)
	if err != nil {
		return fmt.Errorf("opening the supervisor's log: %w", err)
	}
	defer log.Close()
	begin, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("opening the supervisor's log: %w", err)
	}
	keepFiles()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(self, args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), readyEnv+"=3")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("starting the supervisor: %w", err)
	}
	_ = r.SetReadDeadline(time.Now().Add(startTimeout))
	n, err := r.Read(make([]byte, 1))
	if n == 1 {
		go func() { _ = cmd.Wait() }() // so that it leaves no zombie
		return nil
	}
	end := "it ended at once"
	if errors.Is(err, os.ErrDeadlineExceeded) {
		end = fmt.Sprintf("it did not serve within %v", startTimeout)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	} else if err := cmd.Wait(); err != nil {
		end = err.Error()
	}
	said := make([]byte, 2<<10)
	n, _ = log.ReadAt(said, begin)
	text := strings.TrimSpace(string(said[:n]))
	if text == "" {
		return fmt.Errorf("starting the supervisor: %s", end)
	}
	return fmt.Errorf("starting the supervisor: %s:\n%s", end, text)
}

// openLog opens a log for appending. One that has grown long becomes a second
// file beside it, of which there is one.
func openLog(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	if fi, err := os.Stat(path); err == nil && fi.Size() > maxLog {
		if err := os.Rename(path, path+".1"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
}

// Ready returns what a process that was started by Spawn calls once it serves. In
// any other process it returns a function that does nothing.
func Ready(getenv func(string) string) func() {
	fd, err := strconv.Atoi(getenv(readyEnv))
	if err != nil || fd < 3 {
		return func() {}
	}
	syscall.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "ready")
	return func() {
		_, _ = f.Write([]byte{1})
		_ = f.Close()
	}
}
