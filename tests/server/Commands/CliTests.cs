using System.Text.Json;

namespace Rollout.Server.Tests;

public sealed class CliTests(SharedServer shared)
{
    [Theory]
    [InlineData("llama")]
    [InlineData("llama3")]
    [InlineData("qwen2")]
    [InlineData("qwen3")]
    public async Task Generate_prints_the_reference(string model)
    {
        Golden.Case golden = Golden.Cases(model)[0];
        Cli.Result result = await Cli.RunAsync("generate", "--model", Golden.Folder(model), "--ids", string.Join(',', golden.Prompt),
            "--max-tokens", "16", "--temperature", "0", "--ignore-eos", "--json");
        Check(golden, result);
    }

    [Fact]
    public async Task Generate_asks_a_server()
    {
        Golden.Case golden = Golden.Cases("qwen3")[2];
        Cli.Result result = await Cli.RunAsync("generate", "--address", shared.Server.Address, "--ids", string.Join(',', golden.Prompt),
            "--max-tokens", "16", "--temperature", "0", "--ignore-eos", "--json");
        Check(golden, result);
    }

    [Fact]
    public async Task Faster_formats_are_asked_for_by_name_and_differ_a_little()
    {
        Golden.Case golden = Golden.Cases("qwen3")[0];
        string[] command = ["score", "--model", Golden.Folder("qwen3"), "--ids", string.Join(',', golden.Prompt), "--json"];
        float[] bf16 = LogProbs(await Cli.RunAsync([.. command, "--dtype", "bf16"]));
        float[] int8 = LogProbs(await Cli.RunAsync([.. command, "--dtype", "int8"]));
        float[] fast = LogProbs(await Cli.RunAsync([.. command, "--dtype", "bf16-fast"]));
        Assert.Equal(LogProbs(await Cli.RunAsync(command)), bf16);
        Assert.InRange(bf16.Zip(fast, (a, b) => Math.Abs(a - b)).Average(), 1e-6, 0.05);
        Assert.Equal(golden.Prompt.Length - 1, int8.Length);
        Assert.InRange(bf16.Zip(int8, (a, b) => Math.Abs(a - b)).Average(), 1e-4, 0.25);

        static float[] LogProbs(Cli.Result result)
        {
            Assert.True(result.ExitCode == 0, result.Errors);
            return [.. result.Json.GetProperty("positions").EnumerateArray().Select(position => position.GetProperty("logprob"))
                .Where(value => value.ValueKind == JsonValueKind.Number).Select(value => value.GetSingle())];
        }
    }

    private static void Check(Golden.Case golden, Cli.Result result)
    {
        Assert.True(result.ExitCode == 0, result.Errors);
        JsonElement sample = Assert.Single(result.Json.GetProperty("samples").EnumerateArray());
        Assert.Equal(["ids", "logprobs", "sampling_logprobs", "finish_reason"], sample.EnumerateObject().Select(field => field.Name));
        Assert.Equal(golden.Tokens, sample.GetProperty("ids").EnumerateArray().Select(id => id.GetUInt32()));
        Assert.All(golden.LogProbs.Zip(sample.GetProperty("logprobs").EnumerateArray()),
            pair => Assert.Equal(pair.First, pair.Second.GetSingle(), Golden.Tolerance));
        Assert.Equal("length", sample.GetProperty("finish_reason").GetString());
        Assert.EndsWith("}\n", result.Output, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Score_prints_every_position_and_the_next_token()
    {
        Golden.Case golden = Golden.Cases("llama")[1];
        Cli.Result result = await Cli.RunAsync("score", "--model", Golden.Folder("llama"), "--ids", string.Join(',', golden.Prompt),
            "--top", "320", "--json");
        Assert.True(result.ExitCode == 0, result.Errors);
        float[][] logits = Golden.Logits("llama", 1);
        JsonElement[] positions = [.. result.Json.GetProperty("positions").EnumerateArray()];
        Assert.Equal(golden.Prompt.Length, positions.Length);
        for (int row = 0; row < positions.Length; row++)
        {
            float[] expected = Reference.LogSoftmax(logits[row]);
            JsonElement[] top = [.. positions[row].GetProperty("top").EnumerateArray()];
            Assert.Equal(320, top.Length);
            Assert.All(top, entry => Assert.Equal(
                expected[entry.GetProperty("id").GetInt32()], entry.GetProperty("logprob").GetSingle(), Golden.Tolerance));
            if (row + 1 < positions.Length)
            {
                Assert.Equal(golden.Prompt[row + 1], positions[row].GetProperty("id").GetUInt32());
                Assert.Equal(expected[golden.Prompt[row + 1]], positions[row].GetProperty("logprob").GetSingle(), Golden.Tolerance);
            }
            else
            {
                Assert.Equal(JsonValueKind.Null, positions[row].GetProperty("id").ValueKind);
                Assert.Equal(JsonValueKind.Null, positions[row].GetProperty("logprob").ValueKind);
            }
        }
    }

    [Fact]
    public async Task Readable_output_and_every_sampling_option()
    {
        Cli.Result result = await Cli.RunAsync("generate", "--address", shared.Server.Address, "--prompt", "hello", "--n", "2",
            "--seed", "4", "--max-tokens", "20", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--stop", "zzz", "--stop", "yyy",
            "--stop-ids", "300,301", "--min-tokens", "3", "--logit-bias", "5=-1.5", "--logit-bias", "6=-inf,7=2");
        Assert.True(result.ExitCode == 0, result.Errors);
        Assert.Contains("sample 1", result.Output, StringComparison.Ordinal);
        Assert.Contains("seed 4", result.Output, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Inspect_shows_a_folder_and_a_server()
    {
        Cli.Result folder = await Cli.RunAsync("inspect", "--model", Golden.Folder("qwen2"));
        Assert.True(folder.ExitCode == 0, folder.Errors);
        Assert.Contains("tied", folder.Output, StringComparison.Ordinal);
        Cli.Result server = await Cli.RunAsync("inspect", "--address", shared.Server.Address);
        Assert.True(server.ExitCode == 0, server.Errors);
        Assert.Contains("running", server.Output, StringComparison.Ordinal);
    }

    public static TheoryData<string, string[]> BadInput => new()
    {
        { "generate --ids 1", ["--model or --address must be given"] },
        { "generate --model /nowhere --ids 1,x --max-tokens 0 --top-k q",
            ["no folder '/nowhere'", "'x' is not a token id", "--max-tokens", "--top-k"] },
        { "generate --address unix:/nowhere/s --ids 1", ["there is no socket '/nowhere/s'"] },
        { "generate --model GOLDEN --ids 1,999 --temperature -1 --top-p 2", ["prompt_ids[1]", "sampling.temperature", "sampling.top_p"] },
        { "generate --model GOLDEN --prompt hello", ["prompt_text", "tokenizer"] },
        { "score --model GOLDEN --ids 999 --top 9999", ["ids[0]", "top"] },
        { "generate --model GOLDEN --ids 1 --dtype fp32", ["--dtype fp32", "the CPU's"] },
        { "generate --model GOLDEN --ids 1 --device cuda:250", ["cuda"] }, // no library, or no such device: says which
        { "inspect --model GOLDEN/..", ["config.json"] },
        { "serve", ["--model: must be given"] },
        { "serve --model /nowhere --socket /nowhere/s --listen here --kv-cache 3x --threads 0 --device gpu --dtype int4",
            ["no folder '/nowhere'", "--socket", "--listen", "--kv-cache", "--threads", "--device",
                "'int4' is not known; 'bf16', 'bf16-fast', 'int8', 'fp32' are"] },
        { "serve --model /nowhere --kv-cache 140%", ["no folder '/nowhere'", "--kv-cache: '140%' is not a size"] },
        { "serve --model GOLDEN/.. --listen 127.0.0.1:0", ["config.json"] },
        { "frobnicate", ["frobnicate", "rollout --help"] },
        { "sreve --model GOLDEN", ["sreve", "did you mean 'serve'?"] },
        { "generate --model GOLDEN --max-tokns 3", ["--max-tokns", "did you mean '--max-tokens'?"] },
    };

    [Theory]
    [MemberData(nameof(BadInput))]
    public async Task Bad_input_lists_every_problem_and_exits_with_2(string line, string[] expected)
    {
        Cli.Result result = await Cli.RunAsync(line.Replace("GOLDEN", Golden.Folder("qwen3"), StringComparison.Ordinal).Split(' '));
        Assert.Equal(2, result.ExitCode);
        Assert.Equal("", result.Output);
        Assert.All(expected, text => Assert.Contains(text, result.Errors, StringComparison.Ordinal));
        Assert.DoesNotContain("   at ", result.Errors, StringComparison.Ordinal); // no stack traces
    }
}
