using System.Diagnostics;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>Updates from safetensors files that contradict the manifest, or that are not safetensors files.</summary>
public sealed class FileTransportTests
{
    [Fact]
    public async Task A_file_is_refused_for_what_is_wrong_with_it()
    {
        await using ServerProcess server = await ServerProcess.StartAsync();
        Payload payload = Payload.Of("qwen3", (_, elements) => elements.Reverse(), alignment: 1);
        using TemporaryFolder folder = new();
        payload.WriteFile(folder["all"], ..);
        payload.WriteFile(folder["some"], ..3);
        await File.WriteAllTextAsync(folder["text"], "no tensors here, whatever its name says, in more than a few bytes");
        await File.WriteAllBytesAsync(folder["empty"], []);
        await File.WriteAllBytesAsync(folder["cut"], File.ReadAllBytes(folder["all"])[..^10]);
        using (Process fifo = Process.Start("mkfifo", [folder["pipe"]])) await fifo.WaitForExitAsync();
        File.CreateSymbolicLink(folder["link"], folder["pipe"]);
        V1.ManifestTensor third = payload.Manifest[2];
        string Name(int i) => payload.Manifest[i].Name;

        (string Path, string[] Reasons, Action<BeginUpdate>? Change)[] wrong =
        [
            ("", ["absolute"], null),
            ("all", ["absolute"], null),
            ($"{folder["all"]}\0", ["absolute"], null),
            (folder["none"], ["no such file"], null),
            (folder.Path, ["no such file"], null),
            ("/dev/zero", ["not a regular file"], null),
            (folder["pipe"], ["not a regular file"], null),
            (folder["text"], ["text"], null),
            (folder["empty"], ["empty"], null),
            (folder["link"], ["not a regular file"], null),
            (folder["cut"], ["cut"], null),
            (folder["all"], [Name(0), "F16"], begin => begin.Manifest[0].Dtype = TensorDType.F16),
            (folder["all"], ["of its tensors are not in the manifest"], begin =>
            {
                begin.Manifest.RemoveAt(2);
                begin.Partial = true;
            }),
            (folder["all"], [Name(2), "sparse"], begin =>
            {
                begin.Manifest[2].SparseCount = 1;
                begin.Partial = true;
            }),
            (folder["some"], [Name(payload.Manifest.Count - 1)], begin =>
            {
                // Another tensor where the file has its third.
                begin.Partial = true;
                V1.ManifestTensor last = begin.Manifest[^1];
                while (begin.Manifest.Count > 2) begin.Manifest.RemoveAt(2);
                last.Offset = third.Offset;
                begin.Manifest.Add(last);
                begin.PayloadBytes = third.Offset + sizeof(ushort) * last.Shape.Aggregate((product, dimension) => product * dimension);
            }),
            (folder["all"], [Name(0), "is at payload byte 0"], begin =>
            {
                foreach (V1.ManifestTensor tensor in begin.Manifest) tensor.Offset += 2;
                begin.PayloadBytes += 2;
            }),
        ];
        foreach ((string path, string[] reasons, Action<BeginUpdate>? change) in wrong)
        {
            UpdateReply last = (await server.UpdateAsync([payload.Begin(0, 1, change), Updates.FileOf(path, 0)]))[^1];
            Assert.True(last.Failed is not null, $"{path}: {last}");
            Assert.False(last.Failed.Poisoned);
            Assert.All(reasons, reason => Assert.Contains(reason, last.Failed.Reason, StringComparison.Ordinal));
        }

        Golden.Case golden = Golden.Cases("qwen3")[1];
        Assert.Equal(golden.Tokens, (await server.SamplesAsync(Calls.Greedy(golden.Prompt, 16)))[0].Ids);
        UpdateReply right = (await server.UpdateAsync([payload.Begin(0, 1), Updates.FileOf(folder["all"], 0), payload.Commit()]))[^1];
        Assert.Equal(1u, right.Committed?.Version);
    }
}
