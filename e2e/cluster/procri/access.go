package procri

import (
	"bufio"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// searchBit is the permission of everybody to pass through a folder.
const searchBit = 0o001

// closedFolders lists the folders on the way to an image's files that not every user can pass through, parents first.
//
// In a real image, everything is readable for the image's user. Here the files are the machine's, and often lie in somebody's home (the
// interpreter of a virtual environment, a cache), which only its owner may enter. Containers see such folders opened, while what is in
// them keeps its own permissions.
func closedFolders(user uint32, image Image) []string {
	if user == 0 {
		return nil
	}
	var closed []string
	for _, path := range image.paths() {
		for _, folder := range ancestors(path) {
			info, err := os.Stat(folder)
			if err != nil || !info.IsDir() || slices.Contains(closed, folder) {
				continue
			}
			owner := info.Sys().(*syscall.Stat_t).Uid
			if info.Mode().Perm()&searchBit == 0 && owner != user {
				closed = append(closed, folder)
			}
		}
	}
	slices.SortFunc(closed, func(a, b string) int { return strings.Count(a, "/") - strings.Count(b, "/") })
	return closed
}

// paths lists the machine's files and folders that an image names, and the targets of links among them.
func (i Image) paths() []string {
	named := slices.Concat([]string{i.WorkingDir}, i.Files, i.Shared)
	if len(i.Entrypoint) > 0 {
		named = append(named, i.Entrypoint[0], interpreter(i.Entrypoint[0]))
	}
	for name, value := range i.Env {
		for _, path := range filepath.SplitList(value) {
			named = append(named, path)
			if name == "PATH" {
				named = append(named, filepath.Join(path, "python"), filepath.Join(path, "python3"))
			}
		}
	}
	var paths []string
	for _, path := range named {
		if !filepath.IsAbs(path) {
			continue
		}
		paths = append(paths, filepath.Clean(path))
		if resolved, err := filepath.EvalSymlinks(path); err == nil {
			paths = append(paths, resolved)
		}
	}
	return paths
}

// interpreter returns the program that the first line of a script names; empty if the file is not a script.
func interpreter(path string) string {
	file, err := os.Open(path)
	if err != nil {
		return "" // the container's start will report it
	}
	defer func() { _ = file.Close() }() // read only
	line, err := bufio.NewReader(file).ReadString('\n')
	if err != nil {
		return ""
	}
	command, isScript := strings.CutPrefix(line, "#!")
	fields := strings.Fields(command)
	if !isScript || len(fields) == 0 {
		return ""
	}
	return fields[0]
}

// ancestors lists a path and the folders above it, without the root.
func ancestors(path string) []string {
	var found []string
	for ; path != "/" && path != "."; path = filepath.Dir(path) {
		found = append(found, path)
	}
	return found
}
