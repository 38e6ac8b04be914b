using System.CommandLine;
using System.Globalization;
using System.Text.Json;
using Rollout.Engine;
using Rollout.V1;
using Spectre.Console;

namespace Rollout.Server.Commands;

/// <summary>`rollout score`: log-probabilities of given tokens, here or from a server.</summary>
internal sealed class ScoreCommand
{
    private const int ReadableAlternatives = 5;

    private readonly SourceArguments _source = new();
    private readonly Option<uint[]> _ids = Arguments.Ids("--ids", "The tokens to score.");
    private readonly Option<string?> _text = new("--text") { Description = "The text to score; needs a tokenizer.", HelpName = "TEXT" };
    private readonly Option<int?> _top = Arguments.Number("--top", "Most probable alternatives at every position.", 0);
    private readonly Option<bool> _json = new("--json") { Description = "One line of JSON for other programs." };

    public static Command Create() => new ScoreCommand().ToCommand();

    internal Command ToCommand()
    {
        Command command = new("score", "Log-probabilities of given tokens, and of the token after them.");
        _source.AddTo(command);
        foreach (Option option in (Option[])[_ids, _text, _top, _json]) command.Add(option);
        command.Validators.Add(result =>
        {
            bool ids = result.GetResult(_ids) is not null;
            bool text = result.GetResult(_text) is not null;
            if (ids == text) result.AddError("exactly one of --ids and --text must be given");
        });
        command.SetAction(RunAsync);
        return command;
    }

    private async Task<int> RunAsync(ParseResult result, CancellationToken cancellation)
    {
        ScoreRequest request = Request(result);
        await using IRollouts rollouts = await _source.OpenAsync(result);
        ScoreReply reply = await rollouts.ScoreAsync(request, cancellation);
        if (result.GetValue(_json)) PrintJson(reply);
        else PrintReadable(reply, rollouts.Tokenizer);
        return ExitCode.Ok;
    }

    internal ScoreRequest Request(ParseResult result)
    {
        ScoreRequest request = new() { Top = (uint)(result.GetValue(_top) ?? (result.GetValue(_json) ? 0 : ReadableAlternatives)) };
        if (result.GetValue(_text) is { } text) request.Text = text;
        else request.Ids = new TokenIds { Ids = { result.GetValue(_ids)! } };
        return request;
    }

    // Row p has the alternatives for the token after position p: rows 0.. are for ids 1.., and the last row is for the next token.
    private static void PrintJson(ScoreReply reply) => CommandJson.Print(json =>
    {
        json.WriteStartObject();
        json.WriteStartArray("positions");
        for (int row = 0; row < reply.Ids.Count; row++)
        {
            json.WriteStartObject();
            if (row + 1 < reply.Ids.Count)
            {
                json.WriteNumber("id", reply.Ids[row + 1]);
                json.WritePropertyName("logprob");
                json.WriteFloat(reply.Logprobs[row]);
            }
            else
            {
                json.WriteNull("id");
                json.WriteNull("logprob");
            }

            json.WriteStartArray("top");
            foreach ((uint id, float logProb) in Alternatives(reply, row))
            {
                json.WriteStartObject();
                json.WriteNumber("id", id);
                json.WritePropertyName("logprob");
                json.WriteFloat(logProb);
                json.WriteEndObject();
            }

            json.WriteEndArray();
            json.WriteEndObject();
        }

        json.WriteEndArray();
        json.WriteEndObject();
    });

    private static void PrintReadable(ScoreReply reply, Tokenizer? tokenizer)
    {
        string Show(uint id) => Markup.Escape(tokenizer is null ? $"{id}" : $"{id} '{tokenizer.Decode([(int)id])}'");
        string Number(float value) => value.ToString("0.0000", CultureInfo.InvariantCulture);

        Table table = new Table().AddColumns("position", "token", "log-probability", "most probable");
        for (int row = 0; row < reply.Ids.Count; row++)
        {
            bool next = row + 1 == reply.Ids.Count;
            string top = string.Join("  ", Alternatives(reply, row).Select(a => $"{Show(a.Id)} {Number(a.LogProb)}"));
            table.AddRow($"{row + 1}", next ? "next" : Show(reply.Ids[row + 1]), next ? "" : Number(reply.Logprobs[row]), top);
        }

        AnsiConsole.Write(table);
        double sum = reply.Logprobs.Sum(value => (double)value);
        int count = reply.Logprobs.Count;
        Console.WriteLine(FormattableString.Invariant($"sum {sum:0.0000} over {count} tokens, weights version {reply.Version}"));
    }

    private static IEnumerable<(uint Id, float LogProb)> Alternatives(ScoreReply reply, int row)
    {
        int k = (int)(reply.Top?.K ?? 0);
        for (int i = row * k; i < (row + 1) * k; i++) yield return (reply.Top!.Ids[i], reply.Top.Logprobs[i]);
    }
}
