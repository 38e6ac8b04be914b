using System.CommandLine;
using System.Text;
using System.Text.Json;
using Rollout.Engine;
using Rollout.Server.Commands;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>Every option, alone, changes exactly its field of the request, and accepts exactly its valid values.</summary>
public sealed class CommandTests(SharedServer shared)
{
    private const string Server = "--address http://localhost:1";

    [Fact]
    public void Every_option_of_generate_asks_for_what_it_says_and_for_nothing_else()
    {
        GenerateRequest plain = new()
        {
            PromptIds = new TokenIds { Ids = { 5, 6 } },
            N = 1,
            Sampling = new SamplingParams(),
            Stopping = new StoppingParams { MaxTokens = 128 },
        };
        GenerateRequest Parse(string options)
        {
            GenerateCommand command = new();
            ParseResult parsed = command.ToCommand().Parse($"{Server} {options}");
            Assert.Empty(parsed.Errors.Select(error => error.Message));
            return command.Request(parsed);
        }

        Assert.Equal(plain, Parse("--ids 5,6"));
        (string Options, Action<GenerateRequest> Expected)[] cases =
        [
            ("--n 3", r => r.N = 3),
            ("--seed 18446744073709551615", r => r.Seed = ulong.MaxValue),
            ("--seed 0", r => r.Seed = 0),
            ("--max-tokens 1", r => r.Stopping.MaxTokens = 1),
            ("--min-tokens 7", r => r.Stopping.MinTokens = 7),
            ("--temperature 0", r => r.Sampling.Temperature = 0),
            ("--temperature 0.7", r => r.Sampling.Temperature = 0.7f),
            ("--top-k 9", r => r.Sampling.TopK = 9),
            ("--top-p 0.9", r => r.Sampling.TopP = 0.9f),
            ("--min-p 0.05", r => r.Sampling.MinP = 0.05f),
            ("--stop x --stop yy", r => r.Stopping.StopStrings.Add(["x", "yy"])),
            ("--stop-ids 3,4 --stop-ids 5", r => r.Stopping.StopTokenIds.Add([3, 4, 5])),
            ("--logit-bias 5=-1.5 --logit-bias 6=-inf,7=2",
                r => r.Sampling.LogitBias.Add(new Dictionary<uint, float> { [5] = -1.5f, [6] = float.NegativeInfinity, [7] = 2 })),
            ("--ignore-eos", r => r.Stopping.IgnoreEos = true),
            ("--json", _ => { }),
        ];
        foreach ((string options, Action<GenerateRequest> expected) in cases)
            Assert.Equal(plain.Clone().With(expected), Parse($"--ids 5,6 {options}"));
        string[] elsewhere =
            ["--address", "--device", "--dtype", "--ids", "--max-context", "--model", "--prompt", "--threads", "--tokenizer"];
        Assert.Equal(new GenerateCommand().ToCommand().Options.Select(option => option.Name).Order(),
            cases.SelectMany(c => c.Options.Split(' ')).Where(word => word.StartsWith("--", StringComparison.Ordinal))
                .Concat(elsewhere).Distinct().Order());
        Assert.Equal(plain.Clone().With(r => (r.PromptText, r.ReturnText) = ("hello", true)), Parse("--prompt hello"));
    }

    [Fact]
    public void Every_option_of_score_asks_for_what_it_says()
    {
        ScoreRequest Parse(string options)
        {
            ScoreCommand command = new();
            ParseResult parsed = command.ToCommand().Parse($"{Server} {options}");
            Assert.Empty(parsed.Errors.Select(error => error.Message));
            return command.Request(parsed);
        }

        ScoreRequest ids = new() { Ids = new TokenIds { Ids = { 5, 6 } }, Top = 5 };
        Assert.Equal(ids, Parse("--ids 5,6"));
        Assert.Equal(ids.Clone().With(r => r.Top = 0), Parse("--ids 5,6 --json"));
        Assert.Equal(ids.Clone().With(r => r.Top = 2), Parse("--ids 5,6 --json --top 2"));
        Assert.Equal(ids.Clone().With(r => r.Top = 0), Parse("--ids 5,6 --top 0"));
        Assert.Equal(new ScoreRequest { Text = "hello", Top = 5 }, Parse("--text hello"));
    }

    [Theory]
    [InlineData("generate SERVER --ids 1 --prompt x", "exactly one of --ids and --prompt")]
    [InlineData("generate SERVER", "exactly one of --ids and --prompt")]
    [InlineData("generate SERVER --ids 1 --model /", "--model and --address exclude each other")]
    [InlineData("generate SERVER --ids 1 --threads 2", "--threads: the server at --address has its own")]
    [InlineData("generate SERVER --ids 1 --max-context 2", "--max-context: the server at --address has its own")]
    [InlineData("generate SERVER --ids 4294967296", "'4294967296' is not a token id")]
    [InlineData("generate SERVER --ids=-1", "'-1' is not a token id")]
    [InlineData("generate SERVER --ids 1 --n 0", "--n: '0' is not a whole number at least 1")]
    [InlineData("generate SERVER --ids 1 --n 2147483648", "--n: '2147483648'")]
    [InlineData("generate SERVER --ids 1 --top-p x", "--top-p: 'x' is not a number")]
    [InlineData("generate SERVER --ids 1 --logit-bias 5", "'5' is not ID=BIAS")]
    [InlineData("generate SERVER --ids 1 --logit-bias 5=1,5=2", "token 5 is given twice")]
    [InlineData("score SERVER --ids 1 --text x", "exactly one of --ids and --text")]
    [InlineData("score --model / --ids 1 --device gpu", "--device: 'gpu' is not known")]
    [InlineData("score --model / --ids 1 --device cuda:256", "--device: 'cuda:256' is not known")]
    public void What_cannot_be_meant_is_said(string line, string expected)
    {
        RootCommand root = new("test") { GenerateCommand.Create(), ScoreCommand.Create() };
        Assert.Contains(root.Parse(line.Replace("SERVER", Server, StringComparison.Ordinal)).Errors,
            error => error.Message.Contains(expected, StringComparison.Ordinal));
    }

    [Theory]
    [InlineData("512MiB", 512L << 20, 0)]
    [InlineData("9223372036854775807", long.MaxValue, 0)]
    [InlineData("9223372036854775808", null, 0)]
    [InlineData("8388608TiB", null, 0)]   // 2^63
    [InlineData("8388607TiB", 8388607L << 40, 0)]
    [InlineData("0.4B", null, 0)]
    [InlineData("1 kib", 1024L, 0)]
    [InlineData("40%", 0L, 0.4)]
    [InlineData("0.5%", 0L, 0.005)]
    [InlineData("1%", 0L, 0.01)]
    [InlineData("100%", 0L, 1)]
    [InlineData("100.1%", null, 0)]
    [InlineData("0%", null, 0)]
    [InlineData("%", null, 0)]
    [InlineData("-1%", null, 0)]
    public void Memory_is_a_size_or_a_part(string text, long? bytes, double fraction)
    {
        Assert.Equal(bytes is not null, MemoryShare.TryParse(text, out MemoryShare share));
        if (bytes is not null) Assert.Equal((bytes.Value, fraction), (share.Bytes, Math.Round(share.Fraction, 12)));
    }

    [Theory]
    [InlineData(0, "0 B")]
    [InlineData(1023, "1023 B")]
    [InlineData(1024, "1 KiB")]
    [InlineData(1536, "1.5 KiB")]
    [InlineData(1L << 20, "1 MiB")]
    [InlineData(1L << 50, "1024 TiB")]
    public void Sizes_are_written_for_people(long bytes, string expected) => Assert.Equal(expected, ByteSize.Format(bytes));

    [Fact]
    public void Json_has_no_infinities_and_floats_read_back_as_they_were()
    {
        float[] values = [0, -0.1f, float.Epsilon, float.MinValue, float.NegativeInfinity, float.PositiveInfinity, float.NaN, 1 / 3f];
        using MemoryStream written = new();
        using (Utf8JsonWriter json = new(written, CommandJson.WriterOptions))
        {
            json.WriteStartObject();
            json.WriteFloats("values", values);
            json.WriteEndObject();
        }

        JsonElement[] read = [.. JsonDocument.Parse(written.ToArray()).RootElement.GetProperty("values").EnumerateArray()];
        Assert.Equal(values.Select(value => float.IsFinite(value) ? value : (float?)null),
            read.Select(value => value.ValueKind == JsonValueKind.Null ? (float?)null : value.GetSingle()));
    }

    [Theory]
    [InlineData("http://localhost:50051", true)]
    [InlineData("http://localhost:50051/path", false)]
    [InlineData("https://localhost:50051", false)]
    [InlineData("localhost:50051", false)]
    [InlineData("unix:", false)]
    [InlineData("unix:/nowhere/s", false)]
    public void Addresses_of_servers(string address, bool good) => Assert.Equal(good, RemoteRollouts.FindProblem(address) is null);

    /// <summary>The system counts bytes.</summary>
    [Fact]
    public void A_socket_path_may_have_as_many_bytes_as_the_system_takes()
    {
        using TemporaryFolder folder = new();
        int left = Hosting.SocketFile.MaxPathBytes - Encoding.UTF8.GetByteCount(folder.Path) - 1;
        Assert.Null(Hosting.SocketFile.FindProblem(folder[new string('x', left)]));
        Assert.Contains("107", Hosting.SocketFile.FindProblem(folder[new string('x', left + 1)]), StringComparison.Ordinal);
        Assert.Contains("107", Hosting.SocketFile.FindProblem(folder[new string('é', (left / 2) + 1)]), StringComparison.Ordinal);
    }

    [Fact]
    public async Task Options_of_serve_reach_the_engine()
    {
        await using ServerProcess server = await ServerProcess.StartAsync("qwen3",
            "--max-context", "200", "--max-sequences", "3", "--max-batch-tokens", "16", "--kv-cache", "1MiB",
            "--tokenizer", "bytes", "--dtype", "bf16-fast");
        StatusReply before = await server.Control.StatusAsync(new StatusRequest(), deadline: Calls.Deadline());
        ModelSpec model = ModelSpec.Load(Golden.Folder("qwen3"));
        int blockBytes = model.Layers.Sum(layer => 2 * layer.Attention.KvWidth) * 16 * sizeof(float);
        Assert.Equal((200u, (ulong)((1 << 20) / blockBytes)), (before.MaxContext, before.KvBlocksTotal));
        uint[] prompt = [.. Enumerable.Range(0, 100).Select(i => (uint)i)];
        List<GenerateReply> replies = await server.RepliesAsync(Calls.Greedy(prompt, 1, r => r.ReturnText = true));
        Assert.Equal(7ul, (await server.Control.StatusAsync(new StatusRequest())).Steps - before.Steps); // 16 tokens each

        // Three seats: with ten samples of ten tokens, no step draws more than three tokens.
        before = await server.Control.StatusAsync(new StatusRequest());
        await server.SamplesAsync(Calls.Sampled([1, 2], 12, seed: 1, n: 9));
        Assert.InRange((await server.Control.StatusAsync(new StatusRequest())).Steps - before.Steps, 36ul, 45ul);
        ScoreRequest score = new() { Ids = new TokenIds { Ids = { prompt } } };
        await using HeldServer plain = await HeldServer.StartAsync();
        ScoreReply rounded = await server.Rollout.ScoreAsync(score); // as asked
        Assert.NotEqual((await plain.Rollout.ScoreAsync(score)).Logprobs, rounded.Logprobs);
        Assert.Single(replies);
    }

    [Fact]
    public async Task What_a_server_refuses_is_a_failure_and_bad_input_is_not()
    {
        await using HeldServer loading = await HeldServer.StartAsync(loaded: false);
        await using HeldServer asleep = await HeldServer.StartAsync();
        await asleep.Control.SleepAsync(new SleepRequest());
        (string Address, string Ids, int Code, string Says)[] cases =
        [
            (loading.Address, "5", 1, "is not ready: the model is still being loaded"),
            (asleep.Address, "5", 1, "FailedPrecondition: SLEEPING: "),
            (shared.Server.Address, "5,999", 2, "rollout: prompt_ids[1]: "),
        ];
        foreach ((string address, string ids, int code, string says) in cases)
        {
            Cli.Result result = await Cli.RunAsync("generate", "--address", address, "--ids", ids, "--max-tokens", "1", "--json");
            Assert.Equal((code, ""), (result.ExitCode, result.Output));
            Assert.Contains(says, result.Errors, StringComparison.Ordinal);
        }

        asleep.Host.Stop();
        Cli.Result inspected = await Cli.RunAsync("inspect", "--address", asleep.Address);
        Assert.Equal(0, inspected.ExitCode);
        Assert.Contains("sleeping: asleep: All", inspected.Output, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Inspect_fails_for_a_folder_that_cannot_be_served_and_says_what_it_lacks()
    {
        Payload payload = Payload.Of("qwen3", (_, _) => { });
        using TemporaryFolder folder = new();
        payload.WriteModel(folder.Path);
        payload.WriteFile(folder["model.safetensors"], 1..); // without the first
        string header = Encoding.UTF8.GetString(File.ReadAllBytes(folder["model.safetensors"]));
        string last = payload.Manifest[^1].Name;
        byte[] bytes = File.ReadAllBytes(folder["model.safetensors"]);
        int name = header.IndexOf(last, StringComparison.Ordinal);
        Encoding.UTF8.GetBytes(last[..^1] + "x").CopyTo(bytes, name); // and the last by another name
        File.WriteAllBytes(folder["model.safetensors"], bytes);
        Cli.Result result = await Cli.RunAsync("inspect", "--model", folder.Path);
        Assert.Equal(2, result.ExitCode);
        foreach (string line in (string[])["2 tensors missing:", $"  {payload.Manifest[0].Name}", $"  {last}"])
            Assert.Contains($"\n{line}\n", result.Output, StringComparison.Ordinal);
        Assert.Contains($"1 tensors unexpected:\n  {last[..^1]}x\n", result.Output, StringComparison.Ordinal);

        payload.WriteFile(folder["model.safetensors"], 1..);
        Assert.Equal(2, (await Cli.RunAsync("inspect", "--model", folder.Path)).ExitCode);
        payload.WriteFile(folder["model.safetensors"], ..);
        Assert.Equal(0, (await Cli.RunAsync("inspect", "--model", folder.Path)).ExitCode);
    }
}
