using System.Diagnostics;
using Rollout.Kernels;
using Xunit;

namespace Rollout.Engine.Tests;

public sealed class CheckpointTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    private static CancellationToken Cancelled => TestContext.Current.CancellationToken;

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_single_file_is_a_checkpoint()
    {
        using Checkpoint checkpoint = Checkpoint.Open(GoldenFiles.Get("qwen3"));

        CheckpointTensor norm = checkpoint.Tensors["model.norm.weight"];
        Assert.Equal([64], norm.Info.Shape);
        byte[] bytes = new byte[128];
        norm.Read(0, bytes);
        Assert.Contains(bytes, b => b != 0);
    }

    /// <summary>Opening a pipe would wait for ever, and a device has no end.</summary>
    [Theory]
    [InlineData("config.json")]
    [InlineData("model.safetensors")]
    [InlineData("tokenizer.json")]
    public async Task A_pipe_or_a_device_in_the_folder_is_refused_at_once(string name)
    {
        foreach (string file in (string[])["config.json", "model.safetensors"])
            File.Copy(Path.Combine(GoldenFiles.Get("qwen3"), file), _folder[file]);
        foreach ((string program, string[] arguments) in ((string, string[])[])
            [("mkfifo", [_folder[name]]), ("ln", ["-s", "/dev/zero", _folder[name]]), ("ln", ["-s", _folder["pipe"], _folder[name]])])
        {
            using (Process pipe = Process.Start("mkfifo", [_folder["pipe"]])) await pipe.WaitForExitAsync(Cancelled);
            File.Delete(_folder[name]);
            using (Process made = Process.Start(program, arguments)) await made.WaitForExitAsync(Cancelled);
            Task<InvalidModelException> refused = Assert.ThrowsAsync<InvalidModelException>(async () =>
                await RolloutEngine.Load(_folder.Path, new CpuBackend(1), new EngineOptions()).DisposeAsync());
            InvalidModelException error = await refused.WaitAsync(TimeSpan.FromSeconds(10), Cancelled);
            Assert.Contains("it is empty, or not a regular file", error.Message, StringComparison.Ordinal);
            File.Delete(_folder["pipe"]);
        }
    }

    [Fact]
    public void Shards_read_as_one()
    {
        WriteShard("one.safetensors", "a", "b");
        WriteShard("two.safetensors", "c", "unlisted");
        WriteIndex("""{"weight_map":{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors"},"metadata":{"total_size":1}}""");
        using Checkpoint checkpoint = Checkpoint.Open(_folder.Path);

        Assert.Equal(["a", "b", "c", "unlisted"], checkpoint.Tensors.Keys.Order());
        byte[] bytes = new byte[4];
        checkpoint.Tensors["c"].Read(0, bytes);
        Assert.Equal([(byte)'c', (byte)'c', (byte)'c', (byte)'c'], bytes);
    }

    [Fact]
    public void Every_problem_of_every_shard_is_listed()
    {
        WriteShard("one.safetensors", "a", "b");
        WriteShard("two.safetensors", "b");
        _folder.Write("broken.safetensors", [1, 2, 3]);
        WriteIndex("""
            {"weight_map":{"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors","d":"three.safetensors","e":7,
             "f":"../f.safetensors","g":"/etc/passwd","h":"broken.safetensors","i":"three.safetensors"}}
            """);

        InvalidModelException error = Assert.Throws<InvalidModelException>(() => Checkpoint.Open(_folder.Path));
        Assert.Collection(error.Problems,
            p => Assert.Equal("tensor 'b' is in both one.safetensors and two.safetensors", p),
            p => Assert.Contains("tensor 'c' is not in two.safetensors", p),
            p => Assert.Contains("three.safetensors: cannot be read", p),
            p => Assert.Contains("weight_map 'e' must be a file name", p),
            p => Assert.Contains("'../f.safetensors' is not the name", p),
            p => Assert.Contains("'/etc/passwd' is not the name", p),
            p => Assert.Contains("broken.safetensors: the file has 3 bytes", p));
    }

    [Fact]
    public void A_single_file_goes_before_shards_that_lie_beside_it()
    {
        WriteShard("model.safetensors", "a");
        WriteShard("one.safetensors", "b");
        WriteIndex("""{"weight_map":{"b":"one.safetensors"}}""");
        using Checkpoint checkpoint = Checkpoint.Open(_folder.Path);

        Assert.Equal("a", Assert.Single(checkpoint.Tensors.Keys));
    }

    [Fact]
    public void A_tensor_is_where_the_index_says_or_the_checkpoint_is_refused()
    {
        WriteShard("one.safetensors", "a", "b");
        WriteShard("two.safetensors", "c");
        WriteIndex("""{"weight_map":{"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors"}}""");

        InvalidModelException error = Assert.Throws<InvalidModelException>(() => Checkpoint.Open(_folder.Path));
        Assert.Contains("tensor 'b' is not in two.safetensors", Assert.Single(error.Problems));
    }

    [Fact]
    public void A_checkpoint_has_its_shards_open_until_it_is_disposed_or_refused()
    {
        WriteShard("one.safetensors", "a");
        WriteShard("two.safetensors", "b");
        WriteIndex("""{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}""");
        using (Checkpoint.Open(_folder.Path))
            Assert.Equal([_folder["one.safetensors"], _folder["two.safetensors"]], _folder.OpenFiles);
        Assert.Empty(_folder.OpenFiles);

        WriteIndex("""{"weight_map":{"a":"one.safetensors","b":"two.safetensors","c":"two.safetensors"}}""");
        Assert.Throws<InvalidModelException>(() => Checkpoint.Open(_folder.Path));
        Assert.Empty(_folder.OpenFiles);
    }

    [Theory]
    [InlineData("{}", "weight_map must be")]
    [InlineData("[]", "not a JSON object")]
    [InlineData("{", "not valid JSON")]
    [InlineData("""{"weight_map":[]}""", "weight_map must be")]
    [InlineData("""{"weight_map":{}}""", "weight_map is empty")]
    [InlineData("""{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}""", "not valid JSON")]
    [InlineData("""{"weight_map":{"a":"\udc00.safetensors"}}""", "not valid Unicode")]
    [InlineData("""{"weight_map":{"a":"..\\x.safetensors"}}""", "is not the name of")]
    [InlineData("""{"weight_map":{"a":"/x.safetensors"}}""", "is not the name of")]
    [InlineData("""{"weight_map":{"a":"\\x.safetensors"}}""", "is not the name of")]
    [InlineData("""{"weight_map":{"a":":x.safetensors"}}""", "is not the name of")]
    [InlineData("""{"weight_map":{"a":"\u0000.safetensors"}}""", "is not the name of")]
    [InlineData("""{"weight_map":{"a":"x\u0000.safetensors"}}""", "is not the name of")]
    [InlineData("""{"weight_map":{"a":"model.bin"}}""", "is not the name of")]
    public void A_bad_index_is_refused(string index, string problem)
    {
        WriteIndex(index);

        Assert.Contains(problem, Assert.Throws<InvalidModelException>(() => Checkpoint.Open(_folder.Path)).Message);
    }

    [Fact]
    public void A_folder_without_weights_is_refused() =>
        Assert.Contains("has neither model.safetensors nor",
            Assert.Throws<InvalidModelException>(() => Checkpoint.Open(_folder.Path)).Message);

    private void WriteIndex(string json) => _folder.Write("model.safetensors.index.json", json);

    private void WriteShard(string file, params string[] names) =>
        SafetensorsWriter.Write(_folder[file],
            names.Select(name => (new TensorDeclaration(name, DType.Float32, [1]), Enumerable.Repeat((byte)name[0], 4).ToArray())));
}
