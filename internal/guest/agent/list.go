// SPDX-License-Identifier: Apache-2.0

//go:build linux

package agent

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// listFiles writes the list of all files of one file system that drift.ReadManifest
// reads. What another file system is mounted on is listed without what is in it; what
// goes away meanwhile is passed over.
func listFiles(ctx context.Context, w io.Writer, root *os.Root) error {
	out := bufio.NewWriterSize(w, 64<<10)
	l := &lister{ctx: ctx, out: out}
	fmt.Fprint(out, "lab-manifest 1\x00")
	dir, err := root.Open(".")
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		dir.Close()
		return err
	}
	l.device = uint64(st.Dev)
	l.entry("/", "", &st)
	if err := l.folder("/", dir); err != nil {
		return err
	}
	fmt.Fprint(out, "end\x00")
	return out.Flush()
}

type lister struct {
	ctx    context.Context
	out    *bufio.Writer
	device uint64 // of the file system
}

// folder lists what is in an open folder, which it closes.
func (l *lister) folder(path string, dir *os.File) error {
	defer dir.Close()
	for {
		if err := l.ctx.Err(); err != nil {
			return err
		}
		names, err := dir.Readdirnames(1024)
		for _, name := range names {
			if err := l.file(int(dir.Fd()), strings.TrimSuffix(path, "/")+"/"+name, name); err != nil {
				return err
			}
		}
		if err != nil { // the end, or a folder that can't be read any further
			return nil
		}
	}
}

func (l *lister) file(dir int, path, name string) error {
	var st unix.Stat_t
	if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return nil
	}
	target := ""
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		b := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(dir, name, b)
		if err != nil {
			return nil
		}
		target = string(b[:n])
	}
	if err := l.entry(path, target, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || uint64(st.Dev) != l.device {
		return nil
	}
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_NOATIME | unix.O_CLOEXEC
	fd, err := unix.Openat(dir, name, flags, 0)
	if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listing %s: %w", path, err)
	}
	return l.folder(path, os.NewFile(uintptr(fd), path))
}

func (l *lister) entry(path, target string, st *unix.Stat_t) error {
	device := uint64(st.Rdev)
	_, err := fmt.Fprintf(l.out, "x%x - %d %d %d %d.%09d %d.%09d %d %d %d %x:%x\x00", st.Mode, st.Uid, st.Gid, st.Size,
		st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec, st.Ino, st.Nlink, st.Dev, unix.Major(device), unix.Minor(device))
	if err == nil {
		_, err = fmt.Fprintf(l.out, "%s\x00%s\x00", target, path)
	}
	return err
}
