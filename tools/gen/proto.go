package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/linker"
	"github.com/bufbuild/protocompile/protoutil"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

// protoPlugins are the code generators; go.mod pins their versions as tools.
var protoPlugins = []struct{ tool, parameter string }{
	{"protoc-gen-go", "module=kuma"},
	{"protoc-gen-go-grpc", "module=kuma"},
}

// generateProto compiles every .proto file below root/proto and hands the
// result to the plugins, as protoc would; protoc itself is not needed.
func generateProto(ctx context.Context, root string) error {
	base := filepath.Join(root, "proto")
	var files []string
	err := filepath.WalkDir(base, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !entry.IsDir() && strings.HasSuffix(path, ".proto") {
			name, err := filepath.Rel(base, path)
			if err != nil {
				return err
			}
			files = append(files, filepath.ToSlash(name))
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("no .proto file below %s", base)
	}
	slices.Sort(files)

	compiler := protocompile.Compiler{
		Resolver:       protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{base}}),
		SourceInfoMode: protocompile.SourceInfoStandard,
	}
	compiled, err := compiler.Compile(ctx, files...)
	if err != nil {
		return err
	}
	request := &pluginpb.CodeGeneratorRequest{FileToGenerate: files, ProtoFile: descriptors(compiled)}
	for _, plugin := range protoPlugins {
		if err := runPlugin(ctx, root, plugin.tool, plugin.parameter, request); err != nil {
			return err
		}
	}
	return nil
}

// descriptors lists the files and all they import, each after its imports, as
// plugins expect.
func descriptors(files linker.Files) []*descriptorpb.FileDescriptorProto {
	var list []*descriptorpb.FileDescriptorProto
	seen := map[string]bool{}
	var add func(file protoreflect.FileDescriptor)
	add = func(file protoreflect.FileDescriptor) {
		if seen[file.Path()] {
			return
		}
		seen[file.Path()] = true
		imports := file.Imports()
		for i := range imports.Len() {
			add(imports.Get(i).FileDescriptor)
		}
		list = append(list, protoutil.ProtoFromFileDescriptor(file))
	}
	for _, file := range files {
		add(file)
	}
	return list
}

// runPlugin runs one code generator and writes the files that it answers with.
func runPlugin(ctx context.Context, root, tool, parameter string, request *pluginpb.CodeGeneratorRequest) error {
	request = proto.CloneOf(request)
	request.Parameter = &parameter
	input, err := proto.Marshal(request)
	if err != nil {
		return err
	}
	command := exec.CommandContext(ctx, "go", "tool", tool)
	command.Dir = root
	command.Stdin = bytes.NewReader(input)
	var messages bytes.Buffer
	command.Stderr = &messages
	output, err := command.Output()
	if err != nil {
		return fmt.Errorf("go tool %s: %w\n%s", tool, err, messages.Bytes())
	}
	var response pluginpb.CodeGeneratorResponse
	if err := proto.Unmarshal(output, &response); err != nil {
		return fmt.Errorf("the answer of %s: %w", tool, err)
	}
	if response.Error != nil {
		return fmt.Errorf("%s: %w", tool, errors.New(response.GetError()))
	}
	for _, file := range response.File {
		path := filepath.FromSlash(file.GetName())
		if !filepath.IsLocal(path) {
			return fmt.Errorf("%s wants to write outside the module: %s", tool, file.GetName())
		}
		if err := writeFile(filepath.Join(root, path), []byte(file.GetContent())); err != nil {
			return err
		}
	}
	return nil
}
