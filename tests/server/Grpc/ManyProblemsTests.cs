using System.Diagnostics;
using System.Text;
using CsCheck;
using Google.Protobuf;
using Grpc.Core;
using Rollout.Server.Grpc;
using Rollout.V1;

namespace Rollout.Server.Tests;

/// <summary>The answer to an input with thousands of problems is short, quick, and of the right kind.</summary>
public sealed class ManyProblemsTests(SharedServer shared)
{
    private readonly ServerProcess _server = shared.Server;

    public static TheoryData<int> Sizes => [300, 1_000_000];

    /// <summary>A cast of the -100 that trainers pad with.</summary>
    [Theory, MemberData(nameof(Sizes))]
    public async Task A_padded_prompt(int tokens)
    {
        uint[] padding = new uint[tokens];
        Array.Fill(padding, unchecked((uint)-100));
        await IsRefusedAsync(
            () => _server.RepliesAsync(Calls.Greedy(padding, 1)), $"prompt_ids[0]: {unchecked((uint)-100)} is not a token id");
        ScoreRequest score = new() { Ids = new TokenIds { Ids = { padding } } };
        await IsRefusedAsync(() => _server.Rollout.ScoreAsync(score).ResponseAsync, "ids[0]");
    }

    [Fact]
    public async Task Biases_that_are_no_numbers_and_fields_that_nobody_knows()
    {
        uint[] prompt = [1, 2];
        await IsRefusedAsync(() => _server.RepliesAsync(Calls.Greedy(prompt, 1, request =>
        {
            for (uint id = 0; id < 300; id++) request.Sampling.LogitBias[id] = float.NaN;
        })), "sampling.logit_bias[");
        await IsRefusedAsync(() => _server.RepliesAsync(Calls.Greedy(prompt, 1, request =>
        {
            for (uint id = 0; id < 100_000; id++) request.Sampling.LogitBias[3_000_000_000 + id] = 1;
        })), "sampling.logit_bias[3000000000]: 3000000000 is not a token id");
        byte[] unknown = [.. Enumerable.Repeat((byte[])[0x98, 0x06, 0x01], 100_000).SelectMany(field => field)];
        await IsRefusedAsync(() => _server.RepliesAsync(Calls.Greedy(prompt, 1, request => request.MergeFrom(unknown))), "and 99980 more");
    }

    [Fact]
    public async Task A_manifest_of_another_model()
    {
        BeginUpdate begin = new() { NewVersion = 1, PayloadBytes = 1 };
        for (int i = 0; i < 20_000; i++)
            begin.Manifest.Add(new ManifestTensor { Name = $"transformer.h.{i}.attn", Dtype = TensorDType.Bf16, Shape = { 1 } });
        Stopwatch clock = Stopwatch.StartNew();
        using AsyncDuplexStreamingCall<UpdateRequest, UpdateReply> call = _server.Weights.Update(deadline: Calls.Deadline());
        await call.RequestStream.WriteAsync(new UpdateRequest { Begin = begin });
        Assert.True(await call.ResponseStream.MoveNext(default));
        Rejected rejected = call.ResponseStream.Current.Rejected;
        Assert.InRange(clock.Elapsed.TotalSeconds, 0, 5);
        Assert.Equal(
            ("manifest['transformer.h.0.attn']", "the model has no such tensor"),
            (rejected.Problems[0].Field, rejected.Problems[0].Message));
        Assert.Equal((21, ""), (rejected.Problems.Count, rejected.Problems[20].Field));
        Assert.Matches("^and (19|20)[0-9]{3} more$", rejected.Problems[20].Message);
    }

    [Fact]
    public async Task A_checkpoint_of_another_depth()
    {
        using TemporaryFolder folder = new();
        foreach (string file in Directory.GetFiles(Golden.Folder("qwen3")))
            File.Copy(file, Path.Combine(folder.Path, Path.GetFileName(file)));
        string config = Path.Combine(folder.Path, "config.json");
        string text = await File.ReadAllTextAsync(config);
        string deeper = System.Text.RegularExpressions.Regex.Replace(text, "\"num_hidden_layers\": [0-9]+", "\"num_hidden_layers\": 400");
        Assert.NotEqual(text, deeper);
        await File.WriteAllTextAsync(config, deeper);
        Cli.Result result = await Cli.RunAsync("generate", "--model", folder.Path, "--ids", "1", "--max-tokens", "1");
        Assert.Equal(2, result.ExitCode);
        string[] lines = result.Errors.Trim().Split('\n');
        Assert.Equal(21, lines.Length);
        Assert.Matches("^rollout: and [0-9]{4} more$", lines[20]);
    }

    /// <summary>gRPC sends printable ASCII but '%' as it is, and a per cent sign and two digits for every other byte.</summary>
    [Fact]
    public void A_status_text_fits_a_header()
    {
        string[] pieces = ["plain text ", "%", "\u001b[0m", "é", "漢字", "🙂", "\ud800", "\n"];
        Gen.Int[0, pieces.Length - 1].Array[0, 1200].Select(some => string.Concat(some.Select(i => pieces[i]))).Sample(text =>
        {
            string capped = StatusText.Capped(text);
            Assert.InRange(Sent(capped), 0, StatusText.MostBytes);
            if (Sent(text) <= StatusText.MostBytes)
            {
                Assert.Equal(text, capped);
                return;
            }

            Assert.EndsWith("... (cut)", capped, StringComparison.Ordinal);
            Assert.StartsWith(capped[..^9], text, StringComparison.Ordinal);
            Assert.InRange(Sent(capped), StatusText.MostBytes - 12, StatusText.MostBytes);
        }, iter: 2000);

        static int Sent(string text) => Encoding.UTF8.GetBytes(text).Sum(b => b is >= 0x20 and <= 0x7e and not (byte)'%' ? 1 : 3);
    }

    private static async Task IsRefusedAsync(Func<Task> call, string says)
    {
        Stopwatch clock = Stopwatch.StartNew();
        RpcException refused = await Calls.FailsAsync(call, StatusCode.InvalidArgument);
        Assert.Contains(says, refused.Status.Detail, StringComparison.Ordinal);
        Assert.InRange(refused.Status.Detail.Length, 1, StatusText.MostBytes);
        Assert.InRange(clock.Elapsed.TotalSeconds, 0, 5);
    }
}
